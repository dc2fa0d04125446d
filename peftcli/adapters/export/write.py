"""Write an adapter in a form that another program reads, and say what became of each of its parts."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from peftcli.adapters.card import write_card
from peftcli.adapters.export.gguf import Numbers, require_gguf, write_adapter_file, write_model_file
from peftcli.adapters.export.lora import PlainLora, plain_lora
from peftcli.adapters.export.mlx import write_mlx
from peftcli.adapters.export.programs import FORMS, PROGRAMS, Form, traits
from peftcli.adapters.export.replay import ASKED, Replayed, missing, replay, require_same, say
from peftcli.adapters.load import SHARED_FILES, AdapterSource, find_adapter
from peftcli.adapters.merge import merge_adapter
from peftcli.core.files import CONFIG_FILE, WEIGHTS_FILE
from peftcli.errors import AdapterError, UsageError
from peftcli.models.open import OpenBase, open_base
from peftcli.schema import BaseModel
from peftcli.system.disk import write_file
from peftcli.system.outputs import expand_user, new_folder, require_empty
from peftcli.tasks.text.modelfile import modelfile

_OF_LORA = ("lora", "gguf", "mlx")
"""Forms that hold the adapter alone."""
_TRANSLATED = {
    "use_rslora": "its strength is in the matrices: lora_alpha = r",
    "alpha_pattern": "its strengths are in the matrices: lora_alpha = r",
    "rank_pattern": "one r for all modules, padded with zeros",
    "fractional lora_alpha": "its strength is in the matrices: lora_alpha = r",
}
ADAPTER_GGUF, MODELFILE = "adapter.gguf", "Modelfile"


@dataclass(frozen=True)
class _Job:
    """What is written, and of what."""

    source: AdapterSource
    form: Form
    numbers: Numbers
    r: int | None
    max_error: float
    ask: bool
    tell: Callable[[str], None]

    @property
    def chat(self) -> bool:
        """Whether the adapter answers in the chat template."""
        form = self.source.recorded_form
        return form is None or form.chat

    @property
    def model_file(self) -> str:
        """The name of the merged model's .gguf file."""
        return f"model-{self.numbers}.gguf"


def export_adapter(
    adapter: str,
    output: Path,
    *,
    program: str | None = None,
    form: Form | None = None,
    base: str | None = None,
    r: int | None = None,
    max_error: float = 0.01,
    numbers: Numbers = "f16",
    ask: bool = True,
    tell: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Write an adapter to ``output`` in a form that another program reads.

    Args:
        adapter: folder or hub id.
        output: new or empty folder; it appears whole or not at all.
        program: one of ``programs.PROGRAMS``, whose form is taken where none is given.
        form: one of ``programs.FORMS``.
        base: base model in place of the one that the adapter names.
        r: that of a LoRA; None: the smallest usual one that holds the update.
        max_error: the largest share of the update that a LoRA may lose.
        numbers: number format of a merged model's .gguf file.
        ask: whether to ask the program, where it is installed, and compare its answers.
        tell: told of progress.

    Returns:
        What was written, as export.schema.json has it.

    Raises:
        AdapterError: the adapter cannot be read, the form cannot hold it, or the program says something else.
        ModelError: the base model cannot be read, or the form has no place for its family.
        UsageError: settings that do not go together, a missing package, or the output folder holds something.
        StorageError: it cannot be written.
    """
    output = expand_user(output)
    require_empty(output)
    chosen = _form(program, form)
    job = _Job(find_adapter(adapter, base), chosen, numbers, r, max_error, ask, tell)
    _refuse_task(adapter, job)
    lora, replayed = None, None
    if chosen == "merged":
        merge_adapter(adapter, output, base=base, tell=tell)
    elif chosen in _OF_LORA:
        lora, replayed = _write_lora(job, output)
    else:
        replayed = _write_merged(job, adapter, base, output)
    return {"program": program, **_written(job, lora, replayed, output)}


def _written(job: _Job, lora: PlainLora | None, replayed: Replayed | None, output: Path) -> dict[str, Any]:
    """Describe what was written."""
    files = sorted(path for path in output.rglob("*") if path.is_file())
    return {
        "output": str(output),
        "form": job.form,
        "base_model": job.source.base.name,
        "parts": _parts(job, lora),
        "r": lora and lora.r,
        "modules": lora and len(lora.updates),
        "error": lora and lora.error,
        "worst_module": lora and {"module": lora.worst[0], "error": lora.worst[1]},
        "files": {str(path.relative_to(output)): path.stat().st_size for path in files},
        "replayed": replayed and replayed.as_dict(),
        "not_replayed": None if replayed else _why_not(job),
    }


def _form(program: str | None, form: Form | None) -> Form:
    if program is not None and program not in PROGRAMS:
        raise UsageError(f"{program!r} is not one of {', '.join(PROGRAMS)}", key="--for")
    if form is not None:
        return form
    if program is None:
        raise UsageError("give a program with --for, or a form with --form", hint=f"forms: {', '.join(FORMS)}")
    return PROGRAMS[program].form


def _refuse_task(adapter: str, job: _Job) -> None:
    """Refuse an adapter that no program of language models reads, and one that corrects a quantised base."""
    if "gguf" in job.form or job.form == "modelfile":
        require_gguf()
    source = job.source
    if job.form != "merged" and source.config.task_type != "CAUSAL_LM":
        kind = source.task or source.config.task_type or "no task that is known"
        hint = "--form merged writes the merged model of any task"
        raise UsageError(f"is an adapter of {kind}; {job.form} is for language models", file=adapter, hint=hint)
    if job.form in _OF_LORA and source.record.get("makes_up_for_quantization"):
        raise AdapterError(
            "corrects the error of the quantised weights of its base model, and fits no others",
            file=adapter,
            hint=f"merge it: peftcli merge {adapter} --output OUTPUT --dequantize",
        )


def open_dense_base(source: AdapterSource) -> OpenBase:
    """Open the adapter's base model in full precision."""
    return open_base(replace(source.base, quantization=None), processors=source.folder)


def _why_not(job: _Job) -> str | None:
    """Return why no program is asked about what is written; None: one is."""
    if job.form == "merged":
        return "merging has compared the models"
    if not job.ask:
        return "--no-replay"
    asked = ASKED[job.form]
    return (why := missing(asked)) and f"{asked} is not installed: {why}"


def _replay(job: _Job, folder: Path, file: str, opened: OpenBase, exact: bool = True) -> Replayed | None:
    """Ask the program for the form, where it is installed, whether it says the same."""
    if _why_not(job) is not None:
        return None
    job.tell("asking the adapter")
    said = say(job.source)
    job.tell(f"asking {ASKED[job.form]}")
    replayed = replay(job.form, said, folder, file, opened)
    require_same(replayed, folder, job.numbers, exact=exact)
    return replayed


def _write_lora(job: _Job, output: Path) -> tuple[PlainLora, Replayed | None]:
    with open_dense_base(job.source) as opened:
        job.tell("computing what it adds to each weight")
        lora = plain_lora(job.source, opened, job.r, job.max_error)
        with new_folder(output) as folder:
            if job.form == "gguf":
                write_adapter_file(lora, opened, folder / ADAPTER_GGUF)
            elif job.form == "mlx":
                write_mlx(lora, opened, folder)
            else:
                lora.write(job.source, folder)
                _copy_companions(job.source, folder)
            replayed = _replay(job, folder, ADAPTER_GGUF, opened, exact=lora.error == 0)
    return lora, replayed


def _copy_companions(source: AdapterSource, folder: Path) -> None:
    """Copy what says how the model reads and answers, and write a card."""
    for name in SHARED_FILES:
        there = source.folder / name
        if there.is_file() and not name.endswith((CONFIG_FILE, WEIGHTS_FILE, "README.md", "loss.png")):
            write_file(folder / name, there.read_bytes())
    write_card(folder)


def _write_merged(job: _Job, adapter: str, base: str | None, output: Path) -> Replayed | None:
    """Write the merged model as a .gguf file, and a Modelfile beside it where that is the form."""
    output.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=output.parent, prefix=f".{output.name}-merged-"))
    try:
        merge_adapter(adapter, scratch / "model", base=base, tell=job.tell)
        with open_base(BaseModel(name=str(scratch / "model"))) as opened, new_folder(output) as folder:
            job.tell(f"writing {job.model_file}")
            write_model_file(opened, folder / job.model_file, job.numbers, chat=job.chat)
            if job.form == "modelfile":
                reads = opened.processor()
                form = job.source.prompt_form(has_template=bool(reads.chat_template))
                text = modelfile(reads, form, job.model_file, job.source.answer_limits)
                write_file(folder / MODELFILE, text.encode())
            return _replay(job, folder, job.model_file, opened)
    finally:
        with suppress(OSError):
            shutil.rmtree(scratch)


def _parts(job: _Job, lora: PlainLora | None) -> list[dict[str, str]]:
    """Say what became of the adapter's parts."""
    config = job.source.config
    own = traits(config, job.source.header)
    if lora is None:
        found = [("weights", "carried", f"{config.peft_type} is merged into the base model")]
        if job.form != "merged" and job.numbers.startswith("q"):
            found.append(("number format", "approximated", f"weights are rounded to {job.numbers}"))
        if job.form != "merged":
            found.append(("chat template and stop tokens", "carried", f"in {job.model_file}"))
        if job.form == "modelfile":
            found.append(("chat template", "translated", "into Go's, equal on five conversations"))
    else:
        how, more = "carried", "exactly"
        if config.peft_type != "LORA" or set(own) - set(_TRANSLATED):
            how, more = "translated", f"{config.peft_type} as a LoRA of r {lora.r}"
        if lora.error > 0:
            how, more = "approximated", f"{lora.error:.2g} of the update is lost, most in {lora.worst[0]}"
        found = [(f"{len(lora.updates)} modules", how, more)]
        found += [(trait, "translated", _TRANSLATED[trait]) for trait in own if trait in _TRANSLATED]
        if job.form != "lora":
            found.append(("chat template", "not carried", "the base model's own is used"))
    return [{"part": part, "became": how, "more": more} for part, how, more in found]
