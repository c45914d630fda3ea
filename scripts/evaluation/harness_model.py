"""MiniMind as a model of EleutherAI's harness: `lm_eval`'s own `hf` class handles texts and tokens, our decoder and our
engine do the computation.

    lm_eval.simple_evaluate(model=MiniMindHarness(model, tokenizer), tasks=["cmmlu"], num_fewshot=5)
"""

from collections import defaultdict

from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from model import MiniMindLM
from model.chat_template import chat_template_of
from model.inference.request import Request
from model.inference.scheduler import Engine
from scripts.evaluation.likelihoods import Likelihoods, Question
from trainer.errors import UserError


class MiniMindHarness(HFLM):
    """Dense, MoE, an adapter on it, a reasoning model, or a VLM's language half; fp32 where the weights are.

    Texts are tokenised as by the `hf` class with a folder of `convert_model.py to-transformers`, including control
    tokens and chat layout, so that scores are the same, question by question.

    Args:
        batch_size: concurrent questions, or answers being generated.
    """

    def __init__(self, model: MiniMindLM, tokenizer: PreTrainedTokenizerBase, batch_size: int = 16):
        longest = model.config.max_seq_len
        super().__init__(model, "causal", tokenizer=tokenizer, batch_size=batch_size, max_length=longest)
        self.tokenizer.chat_template = chat_template_of(tokenizer)  # the layout that a MiniMind learns
        self._likelihoods = Likelihoods(model, batch_size)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """As defined by the harness: (log-likelihood in nats, whether greedy decoding gives it) of each continuation.

        Texts that occur several times, such as a question with each of its options, are encoded only once.
        """
        pairs = [request.args for request in requests]
        encoded = self._encoded(pairs)
        return self._loglikelihood_tokens(
            [(pair, *encoded[pair]) for pair in pairs],
            disable_tqdm=disable_tqdm,
        )

    def _encoded(self, pairs: list[tuple[str, str]]) -> dict[tuple[str, str], tuple[list[int], list[int]]]:
        """The result of `_encode_pair` for each pair, with all texts encoded in one call, on all cores."""
        texts = dict.fromkeys(text for pair in pairs for text in self._texts(*pair))
        kwargs = {} if self.add_bos_token is None else {"add_special_tokens": self.add_bos_token}
        bos = self.tokenizer.decode(self.prefix_token_id)
        for begins in (True, False):  # what begins with a <s> of its own gets none
            these = [text for text in texts if text.startswith(bos) == begins]
            if these:
                ids = self.tokenizer(these, **({"add_special_tokens": False} if begins else kwargs))["input_ids"]
                texts.update(zip(these, ids, strict=True))
        found = {}
        for pair in pairs:
            if pair[0] == "":
                ids = self.tok_encode(pair[1], add_special_tokens=False)
                prefix = self.prefix_token_id
                found[pair] = ([prefix], ids) if ids[0] != prefix else (ids[:1], ids[1:])
            else:
                context, whole = (texts[text] for text in self._texts(*pair))
                found[pair] = (context, whole[len(context) :])
        return found

    @staticmethod
    def _texts(context: str, continuation: str) -> tuple[str, ...]:
        """The context without trailing spaces, which count as part of the continuation, and the two joined."""
        return (context.rstrip(), context + continuation) if context else ()

    def _loglikelihood_tokens(self, requests, disable_tqdm: bool = False, override_bs: int | None = None):
        """[(texts or None, context, continuation)], ids -> (log-likelihood, greedy) of each."""
        groups = defaultdict(lambda: defaultdict(list))  # by context, then continuation: which requests
        for number, (texts, context, continuation) in enumerate(requests):
            if not continuation:
                raise UserError(f"{texts[1]!r:.60} adds no token to the question before it: it cannot be scored")
            surplus = len(context) + len(continuation) - (self.max_length + 1)
            groups[tuple(context[max(0, surplus) :])][tuple(continuation)].append(number)
        questions = [Question([*context], [[*ids] for ids in options]) for context, options in groups.items()]
        numbers = [[*options.values()] for options in groups.values()]
        found = [(0.0, False)] * len(requests)
        with tqdm(total=len(requests), disable=disable_tqdm, desc="log-likelihoods", unit="text") as bar:
            for question, likelihoods in self._likelihoods.of(questions):
                for these, likelihood in zip(numbers[question], likelihoods, strict=True):
                    for number in these:
                        found[number] = (*likelihood,)
                        if requests[number][0] is not None:
                            self.cache_hook.add_partial("loglikelihood", requests[number][0], (*likelihood,))
                        bar.update()
        return found

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Answers, greedy or sampled as each request says, cut before its first stop string; several at once."""
        engine = Engine(self.model, self.tokenizer, slots=self.batch_size)
        eos = self.tok_decode(self.eot_token_id, skip_special_tokens=False)
        answers = {}
        for number, request in enumerate(requests):
            context, settings = request.args
            kwargs = normalize_gen_kwargs(settings, self.max_gen_toks)
            until, room = handle_stop_sequences(kwargs.get("until"), eos=eos), kwargs["max_gen_toks"]
            if room >= self.max_length:
                raise UserError(
                    f"an answer of {room} tokens is asked for, and the model takes {self.max_length} in all"
                )
            prompt = self.tok_encode(context, left_truncate_len=self.max_length - room)
            answers[number] = engine.submit(
                Request(
                    prompt=prompt,
                    max_new_tokens=room,
                    temperature=kwargs.get("temperature", 0.0) if kwargs.get("do_sample") else 0.0,
                    top_k=kwargs.get("top_k", 0),
                    top_p=kwargs.get("top_p", 1.0),
                    stop=[text for text in until if text != eos],
                )
            )
        with tqdm(total=len(requests), disable=disable_tqdm, desc="answers", unit="answer") as bar:
            while any(answer.finish_reason is None for answer in answers.values()):
                bar.update(sum(piece.finish_reason is not None for _, piece in engine.step()))
        return [
            postprocess_generated_text(answers[number].text, stop=request.args[1].get("until"), think_end_token=None)
            for number, request in enumerate(requests)
        ]
