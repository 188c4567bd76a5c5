"""What options of other kits are called here: one table, for the hint on an unknown option and for docs/coming-from.md.

Chinese-Vicuna's own names are this kit's, so only those of its options stand here that have no namesake. Knows names
alone; imports nothing heavy.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import NamedTuple

KITS = {
    "V": "Chinese-Vicuna",
    "C": "Chinese-LLaMA-Alpaca and -2",
    "A": "Alpaca-CoT",
    "K": "KnowLM",
    "F": "LLaMA-Factory",
}


class OldName(NamedTuple):
    """An option of another kit: its kits (letters of `KITS`), what it is here (the first that a program has; several
    where it means another thing in training and in asking), and what else is to be known."""

    old: str
    kits: str
    here: tuple[str, ...] = ()
    note: str = ""


STEP = "samples per optimizer step; --micro_batch only decides memory"
STAGE = "pt: --objective pretrain, sft: by itself, dpo, kto: --objective dpo, kto; rm: reward"
AT_ONCE = "rows of like length go together; nothing to give"

OLD_NAMES = (
    # the model
    OldName("base_model", "CK", ("--model_path",)),
    OldName("model_name_or_path", "CAF", ("--model_path",)),
    OldName("model_type", "A", note="read from the model's config.json"),
    OldName("size", "A", note="the size is that of the model in --model_path"),
    OldName("tokenizer_path", "C", note="the tokenizer is that of the model, or of the run"),
    OldName("tokenizer_name_or_path", "C", note="the tokenizer is that of the model, or of the run"),
    OldName("load_in_8bit", "C", ("--bits 8",)),
    OldName("int8", "V", ("--bits 8",)),
    OldName("load_8bit", "K", ("--bits 8",)),
    OldName("load_in_4bit", "C", ("--bits 4",)),
    OldName("load_in_kbits", "C", ("--bits",)),
    OldName("quantization_bit", "AF", ("--bits",)),
    OldName("torch_dtype", "C", ("--dtype",)),
    OldName("compute_dtype", "A", ("--dtype",)),
    OldName("infer_dtype", "F", ("--dtype",)),
    OldName("fp16", "C", ("--dtype fp16",), "chosen for the card by itself"),
    OldName("bf16", "F", ("--dtype bf16",), "chosen for the card by itself"),
    OldName("flash_attn", "F", ("--attn_implementation",)),
    OldName("enable_liger_kernel", "F", ("--kernels liger",)),
    OldName("disable_gradient_checkpointing", "F", ("--gradient_checkpointing off",)),
    OldName("only_cpu", "C", ("--device cpu",)),
    OldName("gpus", "C", ("--max_memory", "--device"), "one card: --device cuda:0"),
    OldName("multi_gpu", "K", ("--max_memory",)),
    OldName("allocate", "K", ("--max_memory",)),
    # the data
    OldName("data_file", "C", ("--data_path",)),
    OldName("train_file", "C", ("--data_path",)),
    OldName("dataset", "F", ("--data",)),
    OldName("dataset_dir", "CF", ("--data_path",), "a folder is read whole; its dataset_info.json with --data"),
    OldName("mix_strategy", "F", ("--data",), "a share for each name: NAME:0.2"),
    OldName("interleave_probs", "F", ("--data",), "a share for each name: NAME:0.2"),
    OldName("validation_split_percentage", "C", ("--test_size",), "a fraction: 5 percent is 0.05"),
    OldName("val_set_size", "AK", ("--test_size",), "a count, or a fraction below 1"),
    OldName("val_size", "F", ("--test_size",), "a count, or a fraction below 1"),
    OldName("max_seq_length", "C", ("--cutoff_len",)),
    OldName("block_size", "C", ("--cutoff_len",)),
    OldName("template", "F", ("--prompt_type",)),
    OldName("prompt_template_name", "K", ("--prompt_type",)),
    OldName("prompt_template", "K", ("--prompt_type",)),
    OldName("with_prompt", "C", ("--prompt_type",), "the template of training is used by itself"),
    OldName("system_prompt", "C", ("--system",)),
    OldName("default_system", "F", ("--system",)),
    OldName("train_on_inputs", "K", ("--train_on everything",)),
    OldName("train_on_prompt", "F", ("--train_on everything",)),
    OldName("mask_history", "F", ("--train_on last",)),
    OldName("group_by_length", "K", note=AT_ONCE),
    OldName("neat_packing", "F", ("--packing",), "each sample sees itself alone"),
    OldName("stage", "F", ("--objective",), STAGE),
    OldName("pref_loss", "F", ("--objective",), "sigmoid is dpo"),
    OldName("pref_ftx", "F", ("--sft_weight",)),
    OldName("dpo_label_smoothing", "F", ("--label_smoothing",)),
    OldName("kto_chosen_weight", "F", ("--desirable_weight",)),
    OldName("kto_rejected_weight", "F", ("--undesirable_weight",)),
    OldName("ref_model", "F", note="the reference is the base without the adapter, or the adapter of --init_adapter"),
    OldName("ref_model_adapters", "F", ("--init_adapter",)),
    OldName("do_train", "CF", note="finetune trains; leave it out"),
    OldName("do_eval", "C", ("--test_size",), "0 turns evaluation off"),
    OldName("overwrite_cache", "CF", note="encoded data are made anew whenever anything in them changed"),
    OldName("data_cache_dir", "C", ("--cache_path",)),
    OldName("preprocessing_num_workers", "CF", note="chosen by itself"),
    # the adapter
    OldName("lora_model", "C", ("--lora_path", "--init_adapter")),
    OldName("lora_weights", "K", ("--lora_path", "--init_adapter")),
    OldName("lora_dir", "A", ("--lora_path", "--init_adapter")),
    OldName("peft_path", "C", ("--lora_path", "--init_adapter")),
    OldName("adapter_name_or_path", "F", ("--lora_path", "--init_adapter")),
    OldName("lora_rank", "CF", ("--lora_r",)),
    OldName("trainable", "C", ("--lora_target_modules",)),
    OldName("lora_target", "F", ("--lora_target_modules",), "all is all-linear, the default"),
    OldName("modules_to_save", "C", ("--train_embeddings",)),
    OldName("additional_target", "F", ("--train_embeddings",)),
    OldName("pissa_init", "F", ("--lora_init pissa",)),
    OldName("loraplus_lr_ratio", "F", ("--loraplus_ratio",)),
    OldName("peft_type", "A", ("--peft_method",)),
    OldName("finetuning_type", "F", note="adapters are LoRA here"),
    # the run
    OldName("output_dir", "CAKF", ("--output_path",)),
    OldName("export_dir", "F", ("--output_path",), "of merge"),
    OldName("overwrite_output_dir", "CF", note="give another --output_path: a run is gone on with, never overwritten"),
    OldName("num_train_epochs", "CF", ("--num_epoch",)),
    OldName("num_epochs", "K", ("--num_epoch",)),
    OldName("epochs", "A", ("--num_epoch",)),
    OldName("batch_size", "K", ("--total_batch",), STEP),
    OldName("micro_batch_size", "K", ("--micro_batch",), "chosen by itself so that it fits"),
    OldName("per_device_train_batch_size", "CF", ("--micro_batch",), "chosen so that it fits; steps: --total_batch"),
    OldName("per_gpu_train_batch_size", "A", ("--micro_batch",), "chosen so that it fits; steps: --total_batch"),
    OldName("gradient_accumulation_steps", "CAF", ("--total_batch",), STEP),
    OldName("predict_batch_size", "A", ("--batch_size",)),
    OldName("lr_scheduler_type", "CF", ("--schedule",)),
    OldName("lr_scheduler_kwargs", "F", ("--schedule_options",)),
    OldName("neftune_noise_alpha", "F", ("--neftune_alpha",)),
    OldName("optim", "F", ("--optimizer",)),
    OldName("logging_steps", "CF", ("--log_steps",)),
    OldName("save_total_limit", "CF", ("--keep_checkpoints",)),
    OldName("save_strategy", "CF", ("--save_steps",)),
    OldName("evaluation_strategy", "C", ("--eval_steps",), "--test_size 0 turns evaluation off"),
    OldName("eval_strategy", "F", ("--eval_steps",), "--test_size 0 turns evaluation off"),
    OldName("load_best_model_at_end", "F", ("--final_weights best",)),
    OldName("ignore_data_skip", "V", ("--from_data_beginning",)),
    OldName("report_to", "AF", ("--wandb", "--tensorboard")),
    OldName("wandb_run_name", "K", ("--wandb_project",)),
    OldName("plot_loss", "F", note="loss.png is always drawn"),
    OldName("local_rank", "A", note="given by torchrun; leave it out"),
    OldName("ddp_timeout", "CF", note="leave it out"),
    # asking
    OldName("do_sample", "F", ("--temperature",), "0 is greedy, above 0 samples"),
    OldName("predictions_file", "C", ("--output_path",)),
    OldName("result_dir", "A", ("--output_path",)),
    OldName("interactive", "CK", note="generate without --instruction asks one question after another"),
    OldName("use_typewriter", "V", note="answers always appear word by word"),
    OldName("use_local", "V", note="a directory and a Hub id go into the same option"),
    OldName("show_beam", "V", ("--show_beams",)),
    OldName("share_link", "V", ("--share",)),
    OldName("share_gradio", "K", ("--share",)),
    OldName("server_name", "K", ("--host",)),
)
BY_NAME = {entry.old: entry for entry in OLD_NAMES}


def hint(name: str, known: Collection[str], others: Collection[str]) -> str:
    """What an option of another kit is called here, of the options that a program has; empty for an unknown name.

    known: this program's options; others: those of training and asking, for a name that is none of this program's.
    """
    entry = BY_NAME.get(name)
    if entry is None:
        return ""
    fitting = [here for here in entry.here if flags_in(here) <= set(known)]
    note = entry.note if flags_in(entry.note) <= set(known) else ""
    if fitting:
        return f"; here it is {' or '.join(fitting)}" + (f" ({note})" if note else "")
    if note and not entry.here:
        return f": {note}"
    if any(flags_in(here) <= set(others) for here in entry.here):
        return " in this program; training (onecard finetune) and asking (onecard generate) have their own"
    return ": leave it out"


def flags_in(text: str) -> set[str]:
    """The names of the options that a text mentions, without dashes."""
    return set(re.findall(r"--([a-z_0-9]+)", text))
