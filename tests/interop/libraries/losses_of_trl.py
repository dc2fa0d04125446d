"""The losses of TRL's trainers, over peftcli's batches and models. Prints what tests/preferencekit.py holds."""

import inspect
from collections import defaultdict
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from classifierkit import encoded, open_task
from preferencekit import GRPO, GRPO_ROWS, LOSSES, adapted, examples_of
from trl import DPOTrainer, GRPOTrainer, KTOTrainer, RewardTrainer
from trl.experimental.cpo import CPOTrainer
from trl.experimental.gkd import GKDTrainer
from trl.experimental.orpo import ORPOTrainer

from peftcli.core.inject import disabled
from peftcli.tasks.grpo import advantages_of
from peftcli.tasks.text.divergence import divergences


class Stub:
    """A trainer that has nothing but what its loss reads."""

    def __init__(self, kind: Any, **known: Any):
        self.__dict__.update(known, kind=kind, accelerator=self, device=torch.device("cpu"))
        self._metrics = defaultdict(lambda: defaultdict(list))

    def gather_for_metrics(self, value: Any) -> Any:
        return value

    gather = gather_for_metrics

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.kind, name, None)
        return found.__get__(self) if inspect.isfunction(found) else found


def fused(model: Any) -> Any:
    """The model as TRL's trainers prepare it: log-probabilities of the labels."""

    def forward(input_ids: Any, attention_mask: Any, labels: Any, **_: Any) -> Any:
        logits = model(input_ids=input_ids, attention_mask=attention_mask).logits[:, :-1].log_softmax(-1)
        wanted = labels[:, 1:]
        found = logits.gather(2, wanted.clamp(min=0)[..., None])[..., 0] * (wanted != -100)
        zeros = torch.zeros_like(found)
        return SimpleNamespace(log_probs=found, entropy=zeros, mean_logits=zeros, is_top1=zeros > 0)

    return forward


def of_trl(case: str, batch: Any) -> tuple[float, dict[str, float]]:
    """TRL's loss of a batch, and those of its metrics that are compared."""
    model, settings = adapted(), {"loss": case, **LOSSES[case]}
    loss, smoothing = settings.pop("loss"), settings.pop("label_smoothing", 0.0)
    given = {name: batch[name] for name in ("input_ids", "attention_mask")}
    given["completion_mask"] = batch["_answers"].long()
    with torch.no_grad(), disabled(model):
        reference = fused(model)(**{k: given[k] for k in ("input_ids", "attention_mask")}, labels=batch["labels"])
    known = {"beta": settings["beta"], "model": model, "aux_loss_enabled": False, "ld_alpha": None}
    known |= {"precompute_ref_logps": True, "_total_train_tokens": 0}
    if loss == "dpo" and smoothing:  # which its DPOTrainer leaves out of this loss
        stub = Stub(CPOTrainer, **known, alpha=0.0, loss_type="sigmoid", label_smoothing=smoothing)
        policy = fused(model)(given["input_ids"], given["attention_mask"], batch["labels"])
        rises = (policy.log_probs - reference.log_probs).detach().sum(1).chunk(2)
        losses, chosen, _ = CPOTrainer.cpo_loss(stub, *rises)
        return float(losses.mean()), {"kl_chosen": float(chosen.mean()) / settings["beta"]}
    if loss in ("dpo", "ipo"):
        given["ref_chosen_logps"], given["ref_rejected_logps"] = reference.log_probs.sum(1).chunk(2)
        kind = "sigmoid" if loss == "dpo" else loss
        stub = Stub(
            DPOTrainer,
            **known,
            loss_types=[kind],
            loss_weights=[1.0],
            f_divergence_type="reverse_kl",
            label_smoothing=0.0,
            use_weighting=False,
        )
        found = float(DPOTrainer._compute_loss(stub, fused(model), given, False).detach())
        return found, {"kl_chosen": stub._metrics["eval"]["rewards/chosen"][0] / settings["beta"]}
    if loss == "kto":
        given |= {f"KL_{name}": batch[f"_kl_{name}"] for name in ("input_ids", "attention_mask")}
        given["KL_completion_mask"] = (batch["_kl_labels"] != -100).long()
        given |= {"ref_logps": reference.log_probs.sum(1), "label": batch["_good"]}
        with torch.no_grad(), disabled(model):
            far = fused(model)(given["KL_input_ids"], given["KL_attention_mask"], batch["_kl_labels"])
        given["ref_KL_logps"] = far.log_probs.sum(1)
        weights = {name: settings[name] for name in ("desirable_weight", "undesirable_weight")}
        stub = Stub(KTOTrainer, **known, **weights, calculate_KL=True, loss_type="kto")
        found = float(KTOTrainer._compute_loss(stub, fused(model), given, False).detach())
        return found, {"kl": stub._metrics["eval"]["kl"][0]}
    kind = ORPOTrainer if loss == "orpo" else CPOTrainer
    logits = model(input_ids=given["input_ids"], attention_mask=given["attention_mask"]).logits.detach()
    labels = batch["input_ids"].masked_fill(~batch["_answers"], -100)
    means = kind.get_batch_logps(logits, labels, average_log_prob=True).chunk(2)
    stub = Stub(kind, **settings, alpha=0.0, loss_type=loss, label_smoothing=smoothing)
    if loss == "simpo":
        return float(CPOTrainer.cpo_loss(stub, *means)[0].mean()), {}
    count = len(logits) // 2
    own = torch.nn.functional.cross_entropy(
        logits[:count, :-1].transpose(1, 2),
        given["input_ids"][:count, 1:].masked_fill(given["attention_mask"][:count, 1:] == 0, -100),
    )
    return float(own - ORPOTrainer.odds_ratio_loss(stub, *means)[0].mean()), {}


def check_reward() -> None:
    """The loss of RewardTrainer, with margins."""
    rewards, margins = torch.tensor([0.4, -1.2, 0.9, -1.5]), torch.tensor([1.0, -0.25])
    args = SimpleNamespace(center_rewards_coefficient=None)

    def model(**_: Any) -> SimpleNamespace:
        return SimpleNamespace(logits=rewards[:, None])

    model.training = False
    stub = Stub(RewardTrainer, args=args, model=model, _total_train_tokens=0, _tp_size=1)
    theirs = RewardTrainer.compute_loss(stub, model, {"attention_mask": torch.ones(4, 2), "margin": margins})
    task = open_task("reward", "chat")
    ours = task.loss(model, {"input_ids": rewards, "_margin": margins}).total / 2
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


def check_divergences() -> None:
    """The losses of GKDTrainer, and their gradients."""
    torch.manual_seed(0)
    own, other, labels = torch.randn(2, 9, 40, requires_grad=True), torch.randn(2, 9, 40), torch.zeros(2, 9).long()
    for kind, beta in (("forward_kl", 0), ("reverse_kl", 1), ("jsd", 0.5)):
        theirs = GKDTrainer.generalized_jsd_loss(own, other, labels, beta=beta, temperature=1.5)
        ours = divergences(own.flatten(0, 1), other.flatten(0, 1), kind, 1.5).mean()
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)
        one, two = (torch.autograd.grad(each, own)[0] for each in (ours, theirs))
        torch.testing.assert_close(one, two, atol=1e-6, rtol=1e-4)


def grpo_stub(task: Any, model: Any) -> Stub:
    """GRPOTrainer with a task's settings, and without its fused head."""
    own = task.settings

    def log_probabilities(model: Any, ids: Any, mask: Any, keep: int, **_: Any) -> Any:
        logits = model(input_ids=ids, attention_mask=mask).logits[:, -keep - 1 : -1] / own.temperature
        found = logits.log_softmax(-1).gather(2, ids[:, -keep:, None])[..., 0]
        return found, torch.zeros_like(found), None

    stub = Stub(
        GRPOTrainer,
        **{"model": model, "beta": own.beta, "max_completion_length": own.max_new_tokens, "epsilon_low": 0.2},
        **{"loss_type": "grpo" if own.scale_rewards else "dr_grpo", "epsilon_high": 0.2, "top_entropy_quantile": 1.0},
        **{"aux_loss_enabled": False, "off_policy_mask_threshold": None, "importance_sampling_level": "token"},
        **{"use_vllm": False, "_entropy_bonus_enabled": False, "args": SimpleNamespace(delta=None)},
        _get_per_token_logps_and_entropies=log_probabilities,
        reduce=lambda value, reduction: value,
    )
    stub.args.use_bias_correction_kl = False
    return stub


def check_grpo(**settings: Any) -> None:
    """The loss of GRPOTrainer and its gradients, on answers that our task has sampled."""
    rewards = [{"contains": "a"}, {"contains": "e", "weight": 0.5}, {"regex": "[xyz]"}]
    own = {**GRPO, "rewards": rewards, "max_new_tokens": 64, **settings}
    task, model = open_task("grpo", "chat", **own), adapted()
    batch = task.collate([replace(each, draw=at) for at, each in enumerate(encoded(task, GRPO_ROWS))], training=True)
    ours, (groups,) = task.loss(model, batch), batch["_groups"]
    answers = [each for group in groups.answers for each in group]
    assert {each.ended for each in answers} == {True, False}, "some answers are cut"
    prompts = [row for row in batch["_prompts"] for _ in range(task.settings.group_size)]
    left, right = max(map(len, prompts)), max(len(each.ids) for each in answers)
    counts = [int(each.ended or not task.settings.mask_truncated_completions) for each in answers]
    given = {
        "prompt_ids": [[0] * (left - len(each)) + each for each in prompts],
        "prompt_mask": [[0] * (left - len(each)) + [1] * len(each) for each in prompts],
        "completion_ids": [each.ids + [0] * (right - len(each.ids)) for each in answers],
        "completion_mask": [
            [count] * len(each.ids) + [0] * (right - len(each.ids)) for count, each in zip(counts, answers, strict=True)
        ],
    }
    inputs = {name: torch.tensor(value) for name, value in given.items()}
    advantages = advantages_of(groups.rewards, scale=task.settings.scale_rewards)
    assert advantages.any(axis=1).sum() > 1, "groups teach something"
    inputs["advantages"] = torch.from_numpy(advantages.ravel()).float()
    stub = grpo_stub(task, model)
    ids, mask = (torch.cat([inputs[f"prompt_{name}"], inputs[f"completion_{name}"]], 1) for name in ("ids", "mask"))
    with torch.no_grad(), disabled(model):
        inputs["ref_per_token_logps"] = stub._get_per_token_logps_and_entropies(model, ids, mask, right)[0]
    theirs = GRPOTrainer._compute_loss(stub, model, inputs)
    mean = ours.total / len(groups.answers)
    weights = [each for each in model.parameters() if each.requires_grad]
    gradients = [torch.autograd.grad(loss, weights, retain_graph=True) for loss in (mean, theirs)]
    torch.testing.assert_close(mean, theirs, atol=1e-6, rtol=0)
    torch.testing.assert_close(*gradients, atol=1e-6, rtol=1e-3)
    print(f"    grpo {settings}: {float(theirs.detach()):.8f} here {float(mean.detach()):.8f}")


if __name__ == "__main__":
    check_reward()
    check_divergences()
    check_grpo(beta=0.2)
    check_grpo(scale_rewards=False)
    check_grpo(beta=0.1, mask_truncated_completions=True, temperature=0.7)
    for case in LOSSES:
        task, examples = examples_of(case)
        batch = task.collate(examples, training=False)
        found, (theirs, metrics) = task.loss(adapted(), batch), of_trl(case, batch)
        assert abs(float(found.total.detach()) / len(examples) - theirs) < 1e-4, case
        for name, value in metrics.items():
            assert abs(float(found.sums[name]) / len(examples) - value) < 1e-4, (case, name)
        print(f'    "{case}": {theirs:.6f},')
