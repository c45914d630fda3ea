"""Behind scripts/prepare_data.py: from raw text to the stages' files, in passes over chunks of bounded size."""
