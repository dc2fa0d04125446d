"""The results of the plain way, in less time and memory. To understand training, read the plain way.

| file | what is saved | the plain way | chosen by |
|---|---|---|---|
| ``losses.py`` | logits and their gradient, a chunk at a time | ``token_loss.plain_losses`` | ``target_losses`` |
| ``unpadded.py``, ``segments.py`` | padding, and what rows share | the model's own forward | ``unpad`` |
| ``parts.py`` | memory of a micro-batch | the whole micro-batch | ``train/batches.py`` |
| ``joined.py`` | a pass through the base model for each adapter | one training after another | ``train/together.py`` |
"""
