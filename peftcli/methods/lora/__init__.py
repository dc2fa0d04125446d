"""LoRA: Low-Rank Adaptation of Large Language Models (https://arxiv.org/abs/2106.09685).

``layers.wrap`` is the door, and lora.py is plain LoRA on every kind of layer; fused.py and joined.py compute the same
in less time. No torch here.
"""
