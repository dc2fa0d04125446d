"""What each method makes of a linear layer: the new weight (out, in), or it and the new bias, in a few lines of maths.

A formula gets the adapter layer, the base weight ``w`` and the base bias ``b``. One row a method, or a way of it;
``test_methods_formulas.py`` compares every row with the layer's output and its merged tensors.
"""

from __future__ import annotations

import cmath
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from peftcli.methods.frod.layers import decompose, num_places

Tensor = torch.Tensor
Formula = Callable[[Any, Tensor, Tensor], Any]


@dataclass(frozen=True)
class Row:
    method: str
    settings: dict[str, Any]
    formula: Formula
    starts: bool = True
    """Whether a new adapter changes nothing."""
    shape: tuple[int, int] = (9, 6)
    """(out, in)"""


def principal(w: Tensor, r: int) -> Tensor:
    """The best approximation of rank ``r``."""
    u, s, v = torch.linalg.svd(w)
    return u[:, :r] @ torch.diag(s[:r]) @ v[:r]


def lora(at: Any, w: Tensor, b: Tensor) -> Tensor:
    return w + 4 * at.lora_B.weight @ at.lora_A.weight


def dora(at: Any, w: Tensor, b: Tensor) -> Tensor:
    return at.lora_magnitude_vector[:, None] * lora(at, w, b) / lora(at, w, b).norm(dim=1, keepdim=True)


def delora(at: Any, w: Tensor, b: Tensor) -> Tensor:
    pairs = [(at.delora_B[:, i], at.delora_A[i]) for i in range(3)]
    total = sum(torch.outer(b / b.norm(), a / a.norm()) for b, a in pairs)
    return w + at.delora_lambda / 3 * total * w.norm(dim=0)


def gralora(at: Any, w: Tensor, b: Tensor) -> Tensor:
    delta = torch.zeros(9, 6)
    for m in range(3):
        for n in range(3):
            pair = at.gralora_A[n][:, 2 * m : 2 * m + 2] @ at.gralora_B[m][2 * n : 2 * n + 2]
            delta[3 * m : 3 * m + 3, 2 * n : 2 * n + 2] = pair.T
    beside = at.gralora_B_general.weight @ at.gralora_A_general.weight if at.hybrid else torch.zeros(9, 6)
    return w + 12 / (8 if at.hybrid else 6) * (delta + beside)


def miss(at: Any, w: Tensor, b: Tensor) -> Tensor:
    columns = at.miss_block.shape[1]
    return w + torch.stack([at.miss_block[i % 4, o % columns] for o in range(9) for i in range(6)]).view(9, 6)


def bat(at: Any, w: Tensor, b: Tensor) -> Tensor:
    new = w.clone()
    for o in range(3):
        for i in range(2):
            block = slice(3 * o, 3 * o + 3), slice(3 * i, 3 * i + 3)
            new[block] = w[block] + (w[block] + torch.eye(3)) @ at.miss_block[o]
    return new


def c3a(at: Any, w: Tensor, b: Tensor) -> Tensor:
    kernel, size = at.c3a_kernel, at.block
    numbers = [kernel[o // size, i // size, (i - o) % size] / 6 for o in range(9) for i in range(6)]
    return w + torch.stack(numbers).view(9, 6)


def fourierft(at: Any, w: Tensor, b: Tensor) -> Tensor:
    delta = torch.zeros(9, 6)
    for place, value in zip(at.places.tolist(), at.fourierft_spectrum.tolist(), strict=True):
        u, v = divmod(place, 6)
        for o in range(9):
            for i in range(6):
                delta[o, i] += 7 * value * cmath.exp(2j * cmath.pi * (u * o / 9 + v * i / 6)).real / 54
    return w + delta


def shira(at: Any, w: Tensor, b: Tensor) -> Tensor:
    delta = torch.zeros(9, 6)
    delta[tuple(at.shira_indices.long())] = at.shira_weight
    assert delta.count_nonzero() == 30, "a place was drawn twice"
    return w + delta


def supertuning(at: Any, w: Tensor, b: Tensor) -> Tensor:
    delta = torch.zeros(54).index_put((at.supertuning_indices.long(),), at.supertuning_values).view(9, 6)
    edge = w.abs().flatten().sort(descending=at.largest).values[4]
    assert torch.equal(delta != 0, w.abs() >= edge if at.largest else w.abs() <= edge)
    return w + delta + (at.scaling * at.supertuning_lora_B.weight @ at.supertuning_lora_A.weight if at.scaling else 0)


def randlora(at: Any, w: Tensor, b: Tensor) -> Tensor:
    total = torch.zeros(9, 6)
    for pair in range(6):  # what meets is what stands at the same place in PEFT's two flat orders
        r, n = divmod(pair, 3)
        scaled = at.randlora_lambda[r, n] * at.randlora_A[r, 0] * at.randlora_gamma[n]
        total = total + 3 * torch.outer(at.randlora_B.flatten(1)[:, pair], scaled)
    assert torch.linalg.matrix_rank(total) == 6
    return w + (total if len(w) == 9 else total.T)


def vblora(at: Any, w: Tensor, b: Tensor) -> Tensor:
    def piece(scores: Tensor) -> Any:
        best = scores.argsort(descending=True)[:3]
        weights = scores[best].exp() / scores[best].exp().sum()
        return sum(weight * at.vblora_vector_bank[index] for weight, index in zip(weights, best, strict=True))

    first = torch.stack([torch.cat([piece(each) for each in row]) for row in at.vblora_logits_A])
    second = [torch.cat([piece(row[r]) for row in at.vblora_logits_B]) for r in range(2)]
    return w + torch.stack(second, dim=1) @ first


def unilora(at: Any, w: Tensor, b: Tensor) -> Tensor:
    theta = at.unilora_theta_d
    return w + (theta[at.unilora_indices_B] * at.unilora_scales_B) @ (theta[at.unilora_indices_A] * at.unilora_scales_A)


def pvera(at: Any, w: Tensor, b: Tensor) -> Tensor:
    means = torch.diag(at.pvera_lambda_d[:3]) @ at.pvera_A[:3]
    return w + torch.diag(at.pvera_lambda_b) @ at.pvera_B @ means


def tinylora(at: Any, w: Tensor, b: Tensor) -> Tensor:
    torch.testing.assert_close(at.tinylora_B @ at.tinylora_A, principal(w, 3))
    mixture = sum(number * part for number, part in zip(at.tinylora_v, at.tinylora_P, strict=True))
    return w + at.tinylora_B @ mixture @ at.tinylora_A


def psoft(at: Any, w: Tensor, b: Tensor) -> Tensor:
    torch.testing.assert_close(at.scaling * at.psoft_B @ at.psoft_A, principal(w, 4), atol=1e-4, rtol=1e-4)
    return w + at.scaling * at.psoft_B @ (at.psoft_R() - torch.eye(4)) @ at.psoft_A


def deft(at: Any, w: Tensor, b: Tensor) -> Tensor:
    q, k = (torch.linalg.qr(at.deft_P)[0],) * 2 if at.orthogonal else (at.deft_P, at.deft_P.relu())
    return w - q @ k.T @ w + (0 if at.deft_R is None else 2 * q @ at.deft_R)


def frod(at: Any, w: Tensor, b: Tensor) -> Tensor:
    sparse = torch.zeros(6, 6)
    sparse[tuple(at.frod_s.indices)] = at.frod_lambda_s_values
    assert not sparse.diag().any()
    assert sparse.count_nonzero() == num_places(6, 0.3) == 10
    return decompose(at.frod_V, w)[0] @ (sparse + at.frod_lambda_l.diag()) @ at.frod_V.T


def peanut(at: Any, w: Tensor, b: Tensor) -> Tensor:
    if not at.peanut_encoders:
        return w + 0.5 * at.peanut_B.weight @ (at.peanut_A.weight @ w).relu()
    inward, outward = ([part.weight for part in parts] for parts in (at.peanut_encoders, at.peanut_decoders))
    first = (at.peanut_A.weight @ w).tanh()
    second = (inward[0] @ first).tanh()
    back = (outward[0] @ (inward[1] @ second).tanh()).tanh() + second
    return w + at.peanut_B.weight @ ((outward[1] @ back).tanh() + first)


def poly(at: Any, w: Tensor, b: Tensor) -> Tensor:
    shares = at.poly_router.module_logits[0].sigmoid().view(3, 2)
    shares = shares / shares.sum(1, keepdim=True)
    first = torch.cat([sum(shares[q, s] * at.poly_lora_A[q, s] for s in range(2)) for q in range(3)])
    second = torch.cat([sum(shares[q, s] * at.poly_lora_B[q, s] for s in range(2)) for q in range(3)], dim=1)
    return w + (first @ second).T / 3


def osf(at: Any, w: Tensor, b: Tensor) -> Tensor:
    new = at.osf_svd_params
    return principal(w, 2) + new["U_low"] @ torch.diag(new["S_low"]) @ new["V_low"]


def adamss(at: Any, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    whole, delta, start = torch.cat([w, b[:, None]], dim=1), torch.zeros(9, 7), 0
    torch.testing.assert_close(at.adamss_newB @ at.adamss_newB.T, torch.eye(5))
    assert (whole @ at.adamss_newB.T).norm() > 0.9 * torch.linalg.svdvals(whole)[:5].norm()
    for first, second in zip(at.adamss_A, at.adamss_B, strict=True):
        for number, row in enumerate(second):
            delta[at.adamss_rows.tolist().index(start + number)] = row @ first @ at.adamss_newB
        start += len(second)
    return w + delta[:, :6], b + delta[:, 6]


def glora(at: Any, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    parts = (at.glora_A, at.glora_B, at.glora_C, at.glora_D, at.glora_E)
    first, second, third, fourth, fifth = (part() for part in parts)
    coupled = 0 if isinstance(third, float) else w @ third[:, 0]
    return w + w * first + second, b + b * fourth + fifth + coupled


def ia3(at: Any, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    return (w * at.ia3_l, b) if at.feedforward else (w * at.ia3_l, b * at.ia3_l[:, 0])


def road(at: Any, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    turned = torch.zeros(8, 8)
    for o in range(8):
        group, place = divmod(o, 4)
        of_c, of_s = {
            "road_1": (2 * group + place % 2,) * 2,
            "road_2": (o, o),
            "road_4": (8 * group + place, 8 * group + 4 + place),
        }[at.variant]
        turned[o, o] = at.road_alpha[of_c] * at.road_theta[of_c].cos()
        sine = at.road_alpha[of_s] * at.road_theta[of_s].sin()
        turned[o, o + 2 if place < 2 else o - 2] = -sine if place < 2 else sine
    return turned @ w, turned @ b


def hra(at: Any, w: Tensor, b: Tensor) -> Tensor:
    for u in at.hra_u.T:
        w = w @ (torch.eye(6) - 2 * torch.outer(u, u) / (u @ u))
    return w


def oft(at: Any, w: Tensor, b: Tensor) -> Tensor:
    blocks = []
    for x, y, z in at.oft_R.weight.expand(2, -1).tolist():
        skew = torch.tensor([[0, x, y], [-x, 0, z], [-y, -z, 0]])
        blocks.append((torch.eye(3) - skew) @ torch.linalg.inv(torch.eye(3) + skew))
    return w @ torch.block_diag(*blocks).T


def boft(at: Any, w: Tensor, b: Tensor) -> Tensor:
    return at.boft_s * w @ at.rotated(torch.eye(6)).T


def lokr(at: Any, w: Tensor, b: Tensor) -> Tensor:
    if at.lokr_w1 is None:
        return w + 8 * torch.kron(at.lokr_w1_a @ at.lokr_w1_b, at.lokr_w2_a @ at.lokr_w2_b)
    return w + 2 * torch.kron(at.lokr_w1, at.lokr_w2)


_GLORA = [("lora", "lora", "vector"), ("vector", "vector", "constant"), ("constant", "none", "vector"),
          ("none", "lora", "constant"), ("lora", "vector", "none")]  # fmt: skip
_DEFT: dict[str, Any] = {"r": 3, "alpha": 6, "deft_dropout": 0.5}
_PSOFT: dict[str, Any] = {"r": 4, "psoft_alpha": 3, "psoft_dropout": 0.5}
FORMULAS: dict[str, Row] = {
    "lora": Row("lora", {"r": 3, "lora_alpha": 12, "lora_dropout": 0.5}, lora),
    "dora": Row("lora", {"r": 3, "lora_alpha": 12, "use_dora": True}, dora),
    "adalora": Row("adalora", {"init_r": 3, "target_r": 3, "lora_alpha": 12, "lora_dropout": 0.5},
                   lambda at, w, b: w + 12 / (3 + 1e-5) * at.lora_B @ torch.diag(at.lora_E[:, 0]) @ at.lora_A),
    "hira": Row("hira", {"r": 3, "hira_dropout": 0.5}, lambda at, w, b: w * (1 + at.hira_B @ at.hira_A)),
    "delora": Row("delora", {"r": 3, "module_dropout": 0.5}, delora),
    "gralora": Row("gralora", {"r": 6, "gralora_k": 3, "alpha": 12, "gralora_dropout": 0.5}, gralora),
    "gralora, hybrid": Row("gralora", {"r": 6, "gralora_k": 3, "alpha": 12, "hybrid_r": 2}, gralora),
    "miss": Row("miss", {"r": 4, "miss_dropout": 0.5}, miss),
    "miss, mini": Row("miss", {"r": 4, "init_weights": "mini", "mini_r": 3}, miss),
    "miss, bat": Row("miss", {"r": 3, "init_weights": "bat"}, bat),
    "c3a": Row("c3a", {"block_size": 3, "init_weights": True}, c3a),
    "c3a, numbers": Row("c3a", {"block_size": 1}, c3a, starts=False),
    "fourierft": Row("fourierft", {"n_frequency": 5, "scaling": 7.0, "init_weights": True}, fourierft),
    "waveft, numbers": Row("waveft", {"n_frequency": 7, "use_idwt": False, "scaling": 2.0}, lambda at, w, b: (
        w + 2 * torch.zeros(54).index_put((at.places,), at.waveft_spectrum).view(9, 6))),
    "shira": Row("shira", {"r": 2}, shira),
    "supertuning": Row("supertuning", {"sparsity": 0.9}, supertuning),
    "supertuning, smallest": Row("supertuning", {"sparsity": 0.9, "select_top": False}, supertuning),
    "supertuning, lora": Row("supertuning", {"sparsity": 0.9, "r": 2, "lora_alpha": 6.0, "lora_dropout": 0.5},
                             supertuning),
    "loha": Row("loha", {"r": 3, "alpha": 6}, lambda at, w, b: (
        w + 2 * (at.hada_w1_a @ at.hada_w1_b) * (at.hada_w2_a @ at.hada_w2_b))),
    "lokr": Row("lokr", {"r": 4, "alpha": 8}, lokr),
    "lokr, both": Row("lokr", {"r": 1, "alpha": 8, "decompose_both": True}, lokr, shape=(36, 24)),
    "lokr, factor": Row("lokr", {"r": 4, "alpha": 8, "decompose_factor": 3, "init_weights": "lycoris"}, lokr),
    "vera": Row("vera", {"r": 3, "vera_dropout": 0.5}, lambda at, w, b: (
        w + torch.diag(at.vera_lambda_b) @ at.vera_B @ torch.diag(at.vera_lambda_d) @ at.vera_A)),
    "pvera": Row("pvera", {"r": 3, "pvera_dropout": 0.5}, pvera),
    "randlora": Row("randlora", {"r": 2, "randlora_alpha": 6, "randlora_dropout": 0.5}, randlora),
    "randlora, wide": Row("randlora", {"r": 2, "randlora_alpha": 6}, randlora, shape=(6, 9)),
    "vblora": Row("vblora", {"r": 2, "num_vectors": 7, "vector_length": 3, "topk": 3}, vblora, starts=False),
    "unilora": Row("unilora", {"r": 2, "theta_d_length": 20, "init_weights": False}, unilora, starts=False),
    "tinylora": Row("tinylora", {"r": 3, "u": 5, "tinylora_dropout": 0.5}, tinylora),
    "psoft": Row("psoft", _PSOFT, psoft),
    "psoft, pissa": Row("psoft", {**_PSOFT, "ab_svd_init": "pissa_init"}, psoft),
    "psoft, lowrank": Row("psoft", {**_PSOFT, "psoft_svd": "lowrank", "psoft_svd_lowrank_niter": 50}, psoft),
    "psoft, any matrix": Row("psoft", {**_PSOFT, "psoft_orth": False}, psoft),
    "deft": Row("deft", _DEFT, deft),
    "deft, qr": Row("deft", {**_DEFT, "decomposition_method": "qr"}, deft),
    "deft, para": Row("deft", {**_DEFT, "para": True}, deft, starts=False),
    "deft, para qr": Row("deft", {**_DEFT, "para": True, "decomposition_method": "qr"}, deft, starts=False),
    "frod": Row("frod", {"sparse_rate": 0.3, "frod_dropout": 0.5}, frod),
    "peanut": Row("peanut", {"r": 3, "scaling": 0.5}, peanut),
    "peanut, deep": Row("peanut", {"r": 3, "depth": 2, "act_fn": "tanh"}, peanut),
    "poly": Row("poly", {"r": 3, "n_skills": 2, "n_splits": 3}, poly),
    "osf": Row("osf", {"effective_rank": 2}, osf),
    "osf, wide": Row("osf", {"effective_rank": 2}, osf, shape=(6, 9)),
    "osf, square": Row("osf", {"effective_rank": 2}, osf, shape=(6, 6)),
    "adamss": Row("adamss", {"r": 5, "num_subspaces": 3, "subspace_rank": 2}, adamss),
    "beft": Row("beft", {}, lambda at, w, b: (w, b + at.beft_bias[0])),
    "ia3": Row("ia3", {"feedforward_modules": []}, ia3),
    "ia3, inputs": Row("ia3", {"feedforward_modules": ["0"]}, ia3),
    **{f"road, {variant}": Row("road", {"variant": variant, "group_size": 4}, road, shape=(8, 6))
       for variant in ("road_1", "road_2", "road_4")},
    "hra": Row("hra", {"r": 4}, hra),
    "oft": Row("oft", {"oft_block_size": 3, "use_cayley_neumann": False, "module_dropout": 0.5}, oft),
    "oft, shared": Row("oft", {"oft_block_size": 0, "r": 2, "use_cayley_neumann": False, "block_share": True}, oft),
    "boft": Row("boft", {"boft_block_size": 3, "boft_dropout": 0.5}, boft),
    "boft, butterfly": Row("boft", {"boft_block_size": 2, "boft_n_butterfly_factor": 1}, boft),
    **{f"glora, {a} {c} {d}": Row("glora", {"r": 2, "config_A_B": a, "config_C": c, "config_D_E": d}, glora)
       for a, c, d in _GLORA},
}  # fmt: skip
