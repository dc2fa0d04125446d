"""Messages that need more than a line: what each means and what to do, for ``peftcli explain`` and the reference."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Message:
    """An error or a warning, known by a part of its text."""

    name: str
    parts: tuple[str, ...]
    """Characters that the message has and no other one; of several forms of it, those of each."""
    meaning: str
    advice: str
    page: str
    """The page of the documentation about it, below ``docs/``."""


_TABLE = """
no_format_fits | no format fits the columns
The columns of the rows have none of the names by which a format of texts is known, or only some of them.
Say which column is which in dataset.columns, as in {prompt: question, completion: answer}.
recipes.md#data

no_such_column | ; the rows have:
A column that the task or the recipe names is not in the file. The end of the message lists those that are.
Correct the name in dataset.columns, or name there the column that holds it.
recipes.md#data

no_task_fits | no one task fits
The task is left out, and neither the architecture of the base model nor the columns of the data leave one choice.
Name it: task: NAME. `peftcli info tasks` lists the tasks, `peftcli explain NAME` says which columns one reads.
recipes.md#task

several_tasks_fit | several tasks fit
The task is left out, and more than one can be trained on these columns with this base model.
Name it: task: NAME. `peftcli info tasks` says what the model of each task does.
recipes.md#task

no_such_module | no module of
No layer of the base model has such a name: models of each family call theirs otherwise.
Take one of the names that the message gives, or target_modules: all-linear, or leave it out for the method's usual \
ones.
reference/methods.md

no_chat_template | has no chat template, so conversations cannot be written
The rows are conversations, and the base model's tokenizer does not know how to write one as a text: it is no chat \
model.
Take the instruct version of the model, or set base_model.chat_template: chatml and base_model.new_tokens.
data.md#which-tokens-are-trained

row_too_long | the longest example has
A row has more tokens than the base model has positions.
Set dataset.max_length to the number of positions; dataset.overlong says what becomes of longer rows.
data.md#rows-that-are-too-long

nothing_to_train | zero trained
No row is left, or none has a token that counts in the loss. The message counts the reasons.
Look at the rows: peftcli inspect RECIPE --rows 3. Check dataset.train_on, dataset.format and dataset.max_length.
data.md#which-tokens-are-trained

padding_in_targets | are padding, which this model or method needs
Rows of one batch are filled up to the longest. Padding is never a target, also where the pad token is the end of \
text: it is known by its place.
Nothing needs to be done. Where it costs much time, rows of like length share a batch with \
training.train_sampling_strategy: group_by_length.
data.md#packing

one_class | a classifier needs two
All training rows have one label, so there is nothing to tell apart.
Check dataset.columns: another column may hold the labels. Sorted files that were cut have one class, too.
tasks/sequence_classification.md

loading_script | has a loading script
The dataset is a program that would run here. Such datasets are not loaded by datasets 4 any more.
Look for a copy as Parquet on the hub, often under the revision refs/convert/parquet, or download its files.
recipes.md#data

gated | is gated
Its owners want to know who uses it: each user must accept their terms on its page of the hub.
Accept them in the browser, then log in here with `hf auth login`, or set HF_TOKEN.
recipes.md#base-model

hub_not_reached | the hub cannot be reached
The hub did not answer, and the cache has no copy. A name that is meant as a folder or file looks like a hub id, too.
Check the name and the network, HTTPS_PROXY, HF_ENDPOINT and HF_HUB_OFFLINE. A name of your own files may need ./ \
before it.
ci.md

pickled_weights | can run code when it is read
The model has its weights as a pickle alone, a program of its author's. Such a file is never read.
Load it once in transformers where you trust it, and save it again: save_pretrained writes safetensors.
recipes.md#base-model

code_needed | needs Python code that comes with the model
Its architecture is not in transformers; the author's own code would have to run here.
Read that code, then set base_model.trust_remote_code: true and base_model.revision to the commit that you have read.
recipes.md#base-model

package_missing | needs the package
A part of peftcli that this recipe needs is installed on demand. The end of the message is the command.
Run that command; `peftcli info env` lists the extras, what each is for, and what is missing.
quickstart.md

another_run | of another recipe or other data; nothing was changed
The output folder belongs to one run, and this recipe would train something else. The lines below name the difference.
To train on from a finished adapter: another output_dir, and init_adapter_from with the old one. To try again: \
another output_dir.
recipes.md#the-run-folder

encoded_otherwise | a run whose rows were encoded otherwise
The tokenizer, its chat template, the data on the hub, transformers or peftcli has changed since the run began.
Install what the run began with (run.json has the versions), or start a new run in another training.output_dir.
recipes.md#the-run-folder

other_files | and no run; nothing was changed
The output folder holds files that are not of a run, and training would mix with them.
Choose an empty or new folder as training.output_dir.
recipes.md#the-run-folder

folder_in_use | another run is using this folder
A process trains into it now, here or on another machine that shares the disk.
peftcli status DIR shows it. Wait for it, or choose another training.output_dir.
recipes.md#the-run-folder

not_enough_memory | not enough memory
The model, the rows of one step and what is computed between them do not fit on the device.
In this order: training.per_device_train_batch_size: auto, training.gradient_checkpointing: auto, a smaller \
dataset.max_length, base_model.quantization: nf4.
recipes.md#what-fits-into-memory

not_finite | the loss of step | the gradient norm of step
The loss or the gradients became NaN or Inf: the weights grew without bound, or a number format was too small.
Set training.learning_rate: auto. In float16 use training.bf16 on a device that has it. Look for broken rows: \
peftcli inspect RECIPE.
learning_rates.md

no_sign_of_learning | no sign of learning
The metric is no better than before training, or than an answer that is the same for all rows.
More steps, a larger rate (training.learning_rate: auto), more rows; check with peftcli inspect that labels and \
answers are right.
recipes.md#gates

damaged_checkpoint | damaged checkpoint
A file of the checkpoint is missing or is not what was written: its size or its hash differs.
It is set aside and the one before is used. Check the disk where it happens again.
recipes.md#the-run-folder

not_the_trained_model | the saved adapter is not the trained model
The adapter was loaded in a fresh process and gave other outputs than the trained model. It is not safe to use.
The message names the tensor or key. Another version of transformers or of a package is the usual cause: peftcli \
info env.
recipes.md#the-folder-is-the-model

process_ended | another training process ended
One of several processes stopped, and the others can compute nothing without it. Its own error says why.
Read the first error above. Run the same command again to resume from the last checkpoint.
recipes.md#several-processes

merge_differs | the merged model's outputs differ by
The merged weights do not give the answers of base model and adapter, so nothing was written.
Merge with --dtype float32: rounding to 16 bits is the usual cause.
recipes.md#the-folder-is-the-model

quantised_base | is stored quantised
The base model's weights are in 4 or 8 bits, and rounding merged weights again would lose much of what was learnt.
Merge into the full-precision model with --base, or with --dequantize into the quantised weights made dense.
recipes.md#base-model

secret | looks like a token or password
Recipes are saved with their runs and shared, so a secret in one would be, too.
Set it in the environment, as HF_TOKEN, or log in with `hf auth login`.
recipes.md#values-variables-extends-overrides

peft_too_old | The version of PEFT you are using is not compatible
transformers says so: its add_adapter and load_adapter want a newer peft than the one that is installed.
peftcli needs neither: train, predict and merge work. In Python call peftcli.peft_api.install(version="0.22.0") before \
transformers is imported: it then adapts with peftcli's layers. `peftcli info env` says what fits together.
python.md
"""


def _message(lines: list[str]) -> Message:
    name, *parts = lines[0].split(" | ")
    return Message(name, tuple(parts), *lines[1:])


MESSAGES = {row.name: row for row in (_message(each.splitlines()) for each in _TABLE.strip().split("\n\n"))}
FOREIGN = ("peft_too_old",)
"""Messages of other libraries."""


def find_message(text: str) -> Message | None:
    """Return the message that a text holds; of several, the one with the longest part."""
    plain = " ".join(text.split()).lower()
    found = [(len(part), row) for row in MESSAGES.values() for part in row.parts if part.lower() in plain]
    return max(found, key=lambda each: each[0], default=(0, None))[1]
