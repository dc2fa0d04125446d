"""CPT: Context-aware Prompt Tuning (https://arxiv.org/abs/2410.17222)."""
