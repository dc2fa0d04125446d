"""PEFT's model classes of the tasks. Each names the arguments of its forward pass; a model shows its base model's."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from peftcli.core.layer import TrainedCopy
from peftcli.peft_api.model import PeftModel
from peftcli.peft_api.shown_arguments import ShowsArguments


class _Head(nn.Module):
    """A module of ``modules_to_save`` that is no adapter layer to who looks at its class."""

    def __init__(self, layer: TrainedCopy):
        super().__init__()
        self.layer = layer

    def __getattr__(self, name: str) -> Any:
        return super().__getattr__(name) if name == "layer" else getattr(self.layer, name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.layer(*args, **kwargs)


class PeftModelForCausalLM(PeftModel, task_type="CAUSAL_LM"):
    """A causal language model with an adapter."""

    def get_output_embeddings(self) -> Any:
        """The base model's head. TRL refuses those that are adapter layers, and takes one in ``modules_to_save``."""
        model: Any = self.get_base_model()
        head = model.get_output_embeddings()
        return _Head(head) if isinstance(head, TrainedCopy) else head

    @ShowsArguments
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        kwargs |= _given(inputs_embeds=inputs_embeds, labels=labels)
        return self.base_model(input_ids=input_ids, attention_mask=attention_mask, **kwargs)


class PeftModelForSeq2SeqLM(PeftModel, task_type="SEQ_2_SEQ_LM"):
    """An encoder-decoder language model with an adapter."""

    @ShowsArguments
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        decoder_input_ids: torch.Tensor | None = None,
        decoder_attention_mask: torch.Tensor | None = None,
        decoder_inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        kwargs |= _given(inputs_embeds=inputs_embeds, decoder_inputs_embeds=decoder_inputs_embeds, labels=labels)
        kwargs |= _given(decoder_input_ids=decoder_input_ids, decoder_attention_mask=decoder_attention_mask)
        return self.base_model(input_ids=input_ids, attention_mask=attention_mask, **kwargs)


class PeftModelForSequenceClassification(PeftModel, task_type="SEQ_CLS"):
    """A model that classifies texts, with an adapter."""

    @ShowsArguments
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        kwargs |= _given(attention_mask=attention_mask, inputs_embeds=inputs_embeds, labels=labels)
        return self.base_model(input_ids=input_ids, **kwargs)


class PeftModelForTokenClassification(PeftModelForSequenceClassification, task_type="TOKEN_CLS"):
    """The same, for a model that classifies each token. Logits and labels are those of the tokens of the input."""


class PeftModelForQuestionAnswering(PeftModel, task_type="QUESTION_ANS"):
    """A model that finds answers in texts, with an adapter."""

    @ShowsArguments
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        start_positions: torch.Tensor | None = None,
        end_positions: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        kwargs |= _given(attention_mask=attention_mask, token_type_ids=token_type_ids, position_ids=position_ids)
        kwargs |= _given(inputs_embeds=inputs_embeds, start_positions=start_positions, end_positions=end_positions)
        return self.base_model(input_ids=input_ids, **kwargs)


class PeftModelForFeatureExtraction(PeftModel, task_type="FEATURE_EXTRACTION"):
    """A model without a head, with an adapter."""

    @ShowsArguments
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        kwargs |= _given(attention_mask=attention_mask, inputs_embeds=inputs_embeds)
        return self.base_model(input_ids=input_ids, **kwargs)


def _given(**arguments: torch.Tensor | None) -> dict[str, torch.Tensor]:
    return {name: value for name, value in arguments.items() if value is not None}
