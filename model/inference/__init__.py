"""Generation for many requests at once: request, sampling, detokenizer, scheduler, decoder, thread."""
