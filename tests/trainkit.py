"""What the tests of training and of its products share: tiny base models on disk, tiny data, recipes, child processes.

A child is forked from a server that has imported everything, so it starts in milliseconds, can be killed, and can be
one of several training processes. In pytest the server is itself a fork: see ``fork_server``.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import itertools
import json
import logging
import multiprocessing
import os
import shutil
import signal
import socket
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import forkserver, resource_tracker, util
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from models_tiny import gemma3_towers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MBart50Tokenizer,
    MBartConfig,
    MBartForConditionalGeneration,
    MBartTokenizer,
    NllbTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from peftcli.errors import Interrupted
from peftcli.recipe import load_recipe, to_yaml
from peftcli.schema import Recipe
from peftcli.train import finish
from peftcli.train.events import Event, Message, Stepped
from peftcli.train.finish import loss_curve
from peftcli.train.run import train
from peftcli.train.runs import resume
from peftcli.train.runs.folder import StartOptions

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
WORDS = ["sun", "moon", "red fox", "a river", "seven", "stone bridge", "tea", "winter", "the old mill", "north"]
PAIRS = [
    (f"What follows {WORDS[n % 10]} {n}?", " ".join(WORDS[(n * k) % 10] for k in range(1, 2 + n % 4)))
    for n in range(1, 14)
]
"""Questions and answers of very different lengths."""
MESSAGES = [
    {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
    for question, answer in PAIRS
]
PROMPTS = [{"prompt": question, "completion": f" {answer}"} for question, answer in PAIRS]


@functools.cache
def scratch() -> Path:
    """A folder that lives as long as this process."""
    folder = Path(tempfile.mkdtemp(prefix="peftcli-trainkit-"))
    owner = os.getpid()
    atexit.register(lambda: shutil.rmtree(folder, ignore_errors=True) if os.getpid() == owner else None)
    return folder


def tokenizer(chat: bool = True) -> PreTrainedTokenizerFast:
    """A byte-level BPE of 300 tokens, with a ChatML template unless ``chat`` is off."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([text for pair in PAIRS for text in pair] + ["user\nassistant\nsystem\n"], trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token="<|im_end|>" if chat else "<|endoftext|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
    )
    fast.chat_template = CHATML if chat else None
    return fast


def _llama(tied: bool = False) -> PreTrainedModel:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=300,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=256,
            tie_word_embeddings=tied,
            bos_token_id=None,
            eos_token_id=2,
            pad_token_id=0,
        )
    )


def _gpt2() -> PreTrainedModel:
    rates = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    ids = {"bos_token_id": 0, "eos_token_id": 2}
    return GPT2LMHeadModel(GPT2Config(vocab_size=300, n_embd=32, n_layer=2, n_head=4, n_positions=256, **rates, **ids))


def _t5() -> PreTrainedModel:
    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=300,
            d_model=32,
            d_kv=8,
            d_ff=48,
            num_layers=2,
            num_heads=4,
            dropout_rate=0.0,
            pad_token_id=0,
            eos_token_id=2,
            decoder_start_token_id=0,
        )
    )


def _bart() -> PreTrainedModel:
    sizes = {f"{part}_{name}": size for part in ("encoder", "decoder") for name, size in _BART.items()}
    ids = {"bos_token_id": None, "eos_token_id": 2, "pad_token_id": 0, "decoder_start_token_id": 0}
    return BartForConditionalGeneration(
        BartConfig(vocab_size=300, d_model=32, max_position_embeddings=64, dropout=0.0, init_std=0.2, **sizes, **ids)
    )


_BART = {"layers": 2, "attention_heads": 4, "ffn_dim": 48}
_BUILDERS: dict[str, Callable[[], PreTrainedModel]] = {
    "bart": _bart,
    "llama": _llama,
    "llama_tied": lambda: _llama(tied=True),
    "gpt2": _gpt2,
    "t5": _t5,
    "gemma3_towers": lambda: gemma3_towers(300),
}


def build(kind: str) -> PreTrainedModel:
    """The tiny model, its weights twice as large as transformers starts them."""
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        model = _BUILDERS[kind]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(2.0)
    return model


@functools.cache
def multilingual_base(kind: str) -> Path:
    """The tiny BART with a tokenizer that marks texts with their language, as mbart, mbart50 or nllb do."""
    folder = scratch() / kind
    pieces = ["<s>", "<pad>", "</s>", "<unk>", "\u2581", *"abcdefghijklmnopqrstuvwxyz"]
    scored: Any = [(piece, -float(at)) for at, piece in enumerate(pieces)]
    if kind == "nllb":
        made: Any = NllbTokenizer(vocab={piece: at for at, piece in enumerate(pieces)}, merges=[])
    else:
        made = (MBartTokenizer if kind == "mbart" else MBart50Tokenizer)(vocab=scored)
    special = {"pad_token_id": made.pad_token_id, "eos_token_id": made.eos_token_id}
    sizes = {f"{part}_{name}": size for part in ("encoder", "decoder") for name, size in _BART.items()}
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        config = MBartConfig(
            vocab_size=len(made), d_model=32, max_position_embeddings=64, dropout=0.0, init_std=0.2,
            decoder_start_token_id=made.eos_token_id, **sizes, **special,
        )  # fmt: skip
        MBartForConditionalGeneration(config).save_pretrained(folder)
    made.save_pretrained(folder)
    return folder


@functools.cache
def base_folder(kind: str = "llama", dtype: torch.dtype = torch.float32, shard: str = "1GB", chat: bool = True) -> Path:
    """A base model with its tokenizer, as a folder."""
    folder = scratch() / f"{kind}-{dtype}-{shard}-{chat}".replace("torch.", "")
    build(kind).to(dtype).save_pretrained(folder, max_shard_size=shard)
    tokenizer(chat).save_pretrained(folder)
    return folder


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    """A .jsonl file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_recipe(folder: Path, base: Path | None = None, rows: Sequence[dict[str, Any]] = MESSAGES) -> Path:
    """A recipe beside its data: 10 training rows, 3 to evaluate on, LoRA, float32, 8 steps."""
    folder.mkdir(parents=True, exist_ok=True)
    write_rows(folder / "train.jsonl", rows[:10])
    write_rows(folder / "eval.jsonl", rows[10:])
    path = folder / "recipe.yaml"
    path.write_text(
        f"""\
base_model: {base or base_folder()}
task: causal_lm
method: {{type: lora, r: 4, lora_alpha: 8, target_modules: all-linear}}
dataset: {{train: {folder}/train.jsonl, eval: {folder}/eval.jsonl, max_length: 128}}
training:
  output_dir: {folder}/out
  max_steps: 8
  learning_rate: 5e-3
  per_device_train_batch_size: 4
  per_device_eval_batch_size: 2
  bf16: false
  eval_strategy: "no"
  save_strategy: "no"
  logging_steps: 1
  verify: false
"""
    )
    return path


PRODUCT = ("adapter_config.json", "adapter_model.safetensors", "metrics.jsonl", "loss.png")
"""What must be the same, byte for byte, however often a run was stopped."""
FULL = (
    "method.lora_dropout=0.2",
    "training.per_device_train_batch_size=2",
    "training.gradient_accumulation_steps=2",
    "training.eval_strategy=steps",
    "training.eval_steps=2",
    "training.eval_on_start=true",
    "training.save_strategy=steps",
    "training.save_steps=3",
    "training.load_best_model_at_end=true",
    "training.logging_steps=2",
    "training.warmup_steps=2",
)
"""All that a checkpoint must carry: dropout, accumulation, best adapter, schedule, the loss since the last line."""

PROMPT_TUNING = "method={type: prompt_tuning, num_virtual_tokens: 5}"


def at_step(step: int, action: Callable[[], None]) -> Callable[[Event], None]:
    """A listener that acts once ``step`` is done."""

    def on_event(event: Event) -> None:
        if isinstance(event, Stepped) and event.result.step == step:
            action()

    return on_event


def stop_after(step: int, number: int = signal.SIGTERM) -> Callable[[Event], None]:
    """A listener that sends a signal to this process once ``step`` is done."""
    return at_step(step, lambda: os.kill(os.getpid(), number))


class Trained:
    """A finished run: its content, its events, its files."""

    def __init__(self, recipe: Recipe, run: dict[str, Any], events: list[Event]):
        self.recipe, self.run, self.events = recipe, run, events
        self.folder = Path(recipe.training.output_dir)

    @property
    def weights(self) -> bytes:
        """adapter_model.safetensors."""
        return (self.folder / "adapter_model.safetensors").read_bytes()

    @property
    def warnings(self) -> list[str]:
        """What the user was warned of."""
        return [event.text for event in self.events if isinstance(event, Message) and event.is_warning]

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl."""
        return read_metrics(self.folder)

    @property
    def losses(self) -> list[float]:
        """The loss of each step, from metrics.jsonl."""
        return [entry["loss"] for entry in self.metrics if "loss" in entry]


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def read_run(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "run.json").read_text())


def run_recipe(path: Path, *overrides: str, **options: Any) -> Trained:
    """Train the recipe at ``path`` in this process."""
    reset_accelerate()
    finish.loss_curve, finish.to_yaml, resume.to_yaml = _loss_curve, _to_yaml, _to_yaml
    recipe, events = load_recipe(path, overrides), list[Event]()
    listen = options.pop("on_event", lambda event: None)

    def on_event(event: Event) -> None:
        events.append(event)
        listen(event)

    return Trained(recipe, train(recipe, StartOptions(**options), on_event), events)


def run_until(step: int, path: Path, *overrides: str, **options: Any) -> Path:
    """Train until a signal stops the run after a step; gives its folder."""
    with contextlib.suppress(Interrupted):
        run_recipe(path, *overrides, on_event=stop_after(step), **options)
        raise AssertionError("it was not stopped")
    return path.parent / "out"


def resumed_and_whole(path: Path, *overrides: str, step: int = 4) -> tuple[Trained, Trained]:
    """A run that was stopped after a step and resumed, and the same run without a stop."""
    whole = run_recipe(path, *overrides, f"training.output_dir={path.parent}/whole")
    run_until(step, path, *overrides)
    return run_recipe(path, *overrides), whole


def stopped_copy(recipe: Path, settings: Sequence[str] = (), step: int = 4) -> Path:
    """A run of ``recipe`` that was stopped after a step; gives its folder, beside the recipe.

    It is trained once in this process, in another folder, whose data the recipe then reads.
    """
    first = _stopped(tuple(settings), step)
    out = recipe.parent / "out"
    shutil.copytree(first / "out", out, symlinks=True)
    recipe.write_text((first / "recipe.yaml").read_text().replace(f"{first}/out", str(out)))
    return out


@functools.cache
def _stopped(settings: tuple[str, ...], step: int) -> Path:
    folder = Path(tempfile.mkdtemp(dir=scratch(), prefix="stopped-"))
    run_until(step, write_recipe(folder), *settings)
    return folder


def _loss_curve(metrics: list[dict[str, Any]], title: str = "", main_metric: str = "loss") -> bytes:
    """Curves take a quarter of a tiny run's time, so equal ones are drawn once in this process."""
    names = ("step", "loss", "eval_loss", f"eval_{main_metric}")
    key = repr([title, main_metric, [[entry.get(name) for name in names] for entry in metrics]])
    if key not in _CURVES:
        _CURVES[key] = loss_curve(metrics, title, main_metric)
    return _CURVES[key]


_CURVES: dict[str, bytes] = {}


def _to_yaml(recipe: Recipe) -> str:
    """A run writes its recipe three times, which takes a tenth of a tiny run's time."""
    key = repr(recipe)
    if key not in _RECIPES:
        _RECIPES[key] = to_yaml(recipe)
    return _RECIPES[key]


_RECIPES: dict[str, str] = {}


def reset_accelerate() -> None:
    """Accelerate keeps one state a process and refuses another precision; each run here is a process of its own."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state()


_PRELOADED = [
    "trainkit",
    "matplotlib.backends.backend_agg",
    "matplotlib.figure",
    "peft",  # accelerate imports it where it is installed
    "peftcli.cli.app",
    "peftcli.tasks.text.encode",
    "peftcli.data.sources",
    "peftcli.methods.lora.layers",
    "peftcli.tasks.causal_lm",
    "pydantic",
    "torch.profiler",
    "transformers.models.llama.modeling_llama",
    "transformers.optimization",
]


# --- children -------------------------------------------------------------------------------------------------------


@functools.cache
def _server() -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    return context


def fork_server() -> None:
    """Start the server as a fork of this process, which has imported nearly all of it, before it does anything."""
    _server()
    resource_tracker.ensure_running()
    with warnings.catch_warnings(), mock.patch.object(util, "spawnv_passfds", _forked):
        warnings.simplefilter("ignore", DeprecationWarning)  # of Python 3.12: pytest-xdist's threads stay behind
        forkserver.ensure_running()


def _forked(path: object, args: list[str], passed: Sequence[int]) -> int:
    """Does what ``python -c CODE`` would do in a process with these open files; gives its id."""
    pid = os.fork()
    if pid == 0:
        kept = [2, *sorted(passed), os.sysconf("SC_OPEN_MAX")]
        for before, after in itertools.pairwise(kept):
            os.closerange(before + 1, after)
        sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__
        for logger in (logging.root, *logging.root.manager.loggerDict.values()):
            for handler in [*getattr(logger, "handlers", ())]:
                if isinstance(handler, logging.FileHandler):  # pytest's: closed here, its number is another file's then
                    logger.removeHandler(handler)
        warnings.resetwarnings()
        for kind in (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning):
            warnings.simplefilter("ignore", kind)
        try:
            exec(args[-1], {})
        finally:
            os._exit(0)
    return pid


class Child:
    """``peftcli ARGS`` in a process of its own, whose output goes to files below ``folder``."""

    def __init__(
        self,
        folder: Path,
        *args: object,
        env: dict[str, str] | None = None,
        before: Callable[[], None] | None = None,
        terminal: str | None = None,
    ):
        folder.mkdir(parents=True, exist_ok=True)
        self._out = Path(tempfile.mkdtemp(dir=folder))
        words = [str(arg) for arg in args]
        self.process = _server().Process(target=_child, args=(words, self._out, env or {}, before, terminal))
        self.process.start()

    @property
    def begun(self) -> bool:
        """Whether it has come to peftcli's command line."""
        return (self._out / "err").exists()

    @property
    def out(self) -> str:
        return self._text("out")

    @property
    def err(self) -> str:
        return self._text("err")

    def _text(self, name: str) -> str:
        """What it has written so far; nothing if it was killed before it could."""
        return (self._out / name).read_text() if (self._out / name).exists() else ""

    def wait(self, seconds: float = 240.0) -> int:
        """Its exit code; negative: the signal that killed it."""
        self.process.join(seconds)
        if self.process.exitcode is None:
            self.process.kill()
            self.process.join()
            raise AssertionError(f"still running after {seconds} s:\n{self.err}")
        return self.process.exitcode

    def signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.process.pid, number)

    def until(self, happened: Callable[[], bool], seconds: float = 240.0) -> None:
        """Wait until ``happened()``, while the child lives."""
        deadline = time.monotonic() + seconds
        while not happened():
            assert self.process.is_alive(), self.err
            assert time.monotonic() < deadline, self.err
            time.sleep(0.01)


def ranks(**more: str) -> list[dict[str, str]]:
    """The environments of two processes of one run, as launchers set them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [{**shared, **more, "ACCELERATE_USE_CPU": "true", "RANK": each, "LOCAL_RANK": each} for each in "01"]


def _child(
    args: list[str], out: Path, env: dict[str, str], before: Callable[[], None] | None, terminal: str | None
) -> None:
    os.environ.update(env)
    sys.argv = ["peftcli", *args]
    for number, name in ((1, "out"), (2, "err")):
        path = terminal or str(out / name)
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT, 0o644), number)
    if terminal:
        os.dup2(os.open(terminal, os.O_RDONLY), 0)
        sys.stdin = os.fdopen(0, "r")
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    from peftcli.cli.app import main

    if before is not None:
        before()
    code = main(args)
    sys.stdout.flush()
    os._exit(code)


def files_of(folder: Path) -> dict[str, bytes]:
    """Every file below ``folder`` but the lock."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


def subprocess_environment() -> dict[str, str]:
    """The environment of a real ``python -m peftcli``."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "default"}


@contextlib.contextmanager
def environment(**values: str) -> Iterator[None]:
    """Inside, these variables are set."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None) if value is None else os.environ.update({name: value})
