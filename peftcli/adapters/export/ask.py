"""Ask another program what it makes of prompts, in a process of its own: some end the process where they fail.

The request is JSON on stdin, the answer the last line of stdout. Each function returns the ``rows``: the program's own
tokens of each prompt, or only how many they are; and for the first prompts the ``answers``, as tokens or as ``texts``.
"""

from __future__ import annotations

import json
import os
import sys
import urllib.request
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

_LLAMA_CPP_FIRST = 50
"""Likeliest tokens that are asked for, among which are those that a quantised model is compared by."""


def llama_cpp(request: dict[str, Any]) -> dict[str, Any]:
    """Ask llama.cpp's server, as the package xllamacpp has it."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = request["model"]
    params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(request["adapter"])] if request["adapter"] else []
    longest = max(len(prompt["ids"]) for prompt in request["prompts"]) + request["max_new_tokens"]
    params.n_ctx, params.n_parallel, params.warmup = max(256, longest + 8), 1, False
    params.n_gpu_layers, params.fit_params = 0, False
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = request["threads"]
    server = xllamacpp.Server(params)
    open_url = urllib.request.build_opener(urllib.request.ProxyHandler({})).open

    def post(path: str, body: dict[str, Any]) -> dict[str, Any]:
        headers = {"Content-Type": "application/json"}
        sent = urllib.request.Request(server.listening_address + path, json.dumps(body).encode(), headers)
        with open_url(sent) as answer:
            got: dict[str, Any] = json.load(answer)
        return got

    rows = []
    for prompt in request["prompts"]:
        messages = prompt["messages"]
        text = post("/apply-template", {"messages": messages})["prompt"] if messages else prompt["text"]
        tokens = post("/tokenize", {"content": text, "add_special": True, "parse_special": True})["tokens"]
        rows.append(tokens)
    greedy = {"temperature": 0, "top_k": 1, "repeat_penalty": 1.0, "return_tokens": True, "cache_prompt": False}
    answers, first = [], []
    for prompt in request["prompts"][: request["answers"]]:
        asked = {"prompt": prompt["ids"], "n_predict": request["max_new_tokens"], **greedy}
        answers.append(post("/completion", asked)["tokens"])
        likeliest = post("/completion", {**asked, "n_predict": 1, "n_probs": _LLAMA_CPP_FIRST})
        # none are told of a token that is a part of a letter
        found = [each for one in likeliest.get("completion_probabilities", ()) for each in one["top_logprobs"]]
        first.append({str(each["id"]): each["logprob"] for each in found})
    return {"version": version("xllamacpp"), "rows": rows, "answers": answers, "first": first}


def mlx(request: dict[str, Any]) -> dict[str, Any]:
    """Ask mlx-lm, on the CPU, in float32."""
    import mlx.core as mx
    from mlx_lm.generate import generate_step
    from mlx_lm.tuner.utils import load_adapters
    from mlx_lm.utils import load_model, load_tokenizer

    mx.set_default_device(mx.cpu)
    mx.disable_compile()  # which runs a C++ compiler for each new shape
    folder = Path(request["model"])
    model, _ = load_model(folder)
    if request["adapter"]:
        load_adapters(model, request["adapter"])
    model.set_dtype(mx.float32)
    model.eval()
    reads = load_tokenizer(folder)
    rows = [
        list(reads.apply_chat_template(prompt["messages"], add_generation_prompt=True))
        if prompt["messages"]
        else list(reads.encode(prompt["text"]))
        for prompt in request["prompts"]
    ]
    answers = []
    for prompt in request["prompts"][: request["answers"]]:
        said: list[int] = []
        for token, _ in generate_step(mx.array(prompt["ids"]), model, max_tokens=request["max_new_tokens"]):
            said.append(int(token))
            if said[-1] in request["stops"]:
                break
        answers.append(said)
    return {"version": version("mlx-lm"), "rows": rows, "answers": answers}


def mistralrs(request: dict[str, Any]) -> dict[str, Any]:
    """Ask mistral.rs, in float32. It gives the tokens of a text, and of a conversation their number."""
    import mistralrs as theirs

    adapters = [theirs.LoraAdapter("asked", request["adapter"])]
    which = theirs.Which.Lora(model_id=request["model"], adapters=adapters, dtype=theirs.ModelDType.F32)
    runner = theirs.Runner(which=which)
    rows, counts, texts = [], [], []
    for at, prompt in enumerate(request["prompts"]):
        rows.append(list(runner.tokenize_text(prompt["text"], not prompt["messages"], False)))
        if at >= request["answers"]:
            continue
        more = {"max_tokens": request["max_new_tokens"], "temperature": 0.0, "top_k": 1, "adapter": "asked"}
        if prompt["messages"]:
            asked = theirs.ChatCompletionRequest(model="default", messages=prompt["messages"], **more)
            got = runner.send_chat_completion_request(asked)
            texts.append(got.choices[0].message.content or "")
        else:
            asked = theirs.CompletionRequest(model="default", prompt=prompt["text"], **more)
            got = runner.send_completion_request(asked)
            texts.append(got.choices[0].text)
        counts.append(got.usage.prompt_tokens)
    return {"version": version("mistralrs"), "rows": rows, "counts": counts, "texts": texts}


ASK: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "llama.cpp": llama_cpp,
    "mlx": mlx,
    "mistralrs": mistralrs,
}
"""Program -> what asks it."""


def main() -> None:
    """Answer the request on stdin. What the program prints goes to stderr."""
    out = os.dup(1)
    os.dup2(2, 1)
    request = json.load(sys.stdin)
    answer = ASK[request["program"]](request)
    with os.fdopen(out, "w") as stream:
        stream.write(json.dumps(answer) + "\n")
    sys.stderr.flush()
    os._exit(0)  # a server's threads may not end


if __name__ == "__main__":
    main()
