"""Which fields of a request change nothing here, and which would: those are refused by name, unless they are off.

Knows the parameters of OpenAI's API and the usual additions of vLLM and llama.cpp. It does not know what the fields
that this server uses do (`requests.py`).
https://platform.openai.com/docs/api-reference, https://docs.vllm.ai/en/latest/serving/openai_compatible_server.html,
https://github.com/ggml-org/llama.cpp/blob/master/tools/server/README.md
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from onecard.console import nearest
from onecard.serve.http_error import bad_request

# Parameters that this server does not have, with the values that ask for nothing.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    # OpenAI's
    "audio": (None,),
    "best_of": (None, 0, 1),
    "dimensions": (None,),
    "frequency_penalty": (None, 0),
    "function_call": (None, "none", "auto"),  # as tool_choice: without functions there is nothing to choose
    "functions": (None, []),
    "logit_bias": (None, {}, []),
    "modalities": (None, [], ["text"]),
    "moderation": (None,),
    "parallel_tool_calls": (None, False, True),
    "prediction": (None,),
    "presence_penalty": (None, 0),
    "reasoning_effort": (None, "none"),
    "response_format": (None, {"type": "text"}),
    "suffix": (None, ""),
    "tool_choice": (None, "none", "auto"),
    "tools": (None, []),
    "top_logprobs": (None, 0),
    "verbosity": (None, "medium"),
    "web_search_options": (None,),
    # OpenAI's of /v1/responses; no answer is kept here, so none can be gone on with
    "access_programs": (None,),
    "background": (None, False),
    "background_options": (None,),
    "context_management": (None, []),
    "conversation": (None,),
    "image": (None,),
    "include": (None, []),
    "max_tool_calls": (None,),
    "previous_response_id": (None,),
    "truncation": (None, "disabled"),
    # vLLM's
    "add_generation_prompt": (None, True),
    "add_special_tokens": (None,),
    "allowed_token_ids": (None,),
    "bad_words": (None, []),
    "chat_template": (None,),
    "chat_template_kwargs": (None, {}),
    "continue_final_message": (None, False),
    "documents": (None, []),
    "ec_transfer_params": (None,),
    "echo": (None, False),
    "guided_choice": (None,),
    "guided_grammar": (None,),
    "guided_json": (None,),
    "guided_regex": (None,),
    "ignore_eos": (None, False),
    "include_reasoning": (None, True),
    "include_stop_str_in_output": (None, False),
    "kv_transfer_params": (None,),
    "length_penalty": (None, 1),
    "logits_processors": (None, []),
    "media_io_kwargs": (None, {}),
    "min_p": (None, 0),
    "mm_processor_kwargs": (None, {}),
    "normalize": (None, True),  # vectors have length 1
    "priority": (None, 0),
    "prompt_logprobs": (None,),
    "repetition_detection": (None,),
    "return_assistant_tokens_mask": (None, False),
    "return_prompt_text": (None, False),
    "return_token_ids": (None, False),
    "return_token_offsets": (None, False),
    "return_tokens_as_token_ids": (None, False),
    "skip_special_tokens": (None, True),
    "spaces_between_special_tokens": (None, True),
    "stop_token_ids": (None, []),
    "structured_outputs": (None,),
    "thinking_token_budget": (None,),
    "truncate_prompt_tokens": (None,),
    "truncation_side": (None,),
    "use_beam_search": (None, False),
    "vllm_xargs": (None, {}),
    # llama.cpp's
    "adaptive_target": (None, -1),
    "dry_multiplier": (None, 0),
    "dynatemp_range": (None, 0),
    "grammar": (None, ""),
    "id_slot": (None, -1),
    "json_schema": (None,),
    "lora": (None, []),
    "min_keep": (None, 0),
    "mirostat": (None, 0),
    "n_discard": (None, 0),
    "n_indent": (None, 0),
    "n_keep": (None, 0, -1),  # how much stays of a prompt that is too long; such a prompt is refused here
    "n_predict": (None, -1),
    "n_probs": (None, 0),
    "penalize_nl": (None, False),
    "post_sampling_probs": (None, False),
    "reasoning_format": (None, "none"),
    "repeat_last_n": (None, -1),
    "repeat_penalty": (None, 1),
    "return_progress": (None, False),
    "return_tokens": (None, False),
    "samplers": (None,),
    "tfs_z": (None, 1),
    "timings_per_token": (None, False),
    "top_a": (None, 0),
    "top_n_sigma": (None, -1),
    "typical_p": (None, 1),
    "xtc_probability": (None, 0),
}
# Numbers that belong to a parameter above, and mean nothing while that one is off.
WITHOUT_EFFECT = (
    "adaptive_decay", "dry_allowed_length", "dry_base", "dry_penalty_last_n", "dynatemp_exponent", "mirostat_eta",
    "mirostat_tau", "xtc_threshold",
)  # fmt: skip
# What clients send back of an earlier answer's message, and what has no meaning here.
NEUTRAL_IN_MESSAGE: dict[str, tuple[Any, ...]] = {
    "annotations": (None, []),
    "audio": (None,),
    "function_call": (None,),
    "refusal": (None, ""),
}
# Marks for the caches of other servers; they stand beside the text of a part, and some at a message.
CACHE_MARKS = ("cache_control", "prompt_cache_breakpoint")
OTHER_NAMES = {
    "function_call": "tool_choice",
    "functions": "tools",
    "max_length": "max_tokens",
    "max_new_tokens": "max_tokens",
    "min_new_tokens": "min_tokens",
    "n_predict": "max_tokens",
    "repeat_penalty": "repetition_penalty",
    "use_beam_search": "num_beams",
}


def check_names(extra: Mapping[str, Any], known: Mapping[str, Any]) -> None:
    """Refuse the fields that this server does not have, unless their values ask for nothing. Raises ApiError."""
    for name, value in extra.items():
        if is_neutral(value, NEUTRAL.get(name, (None,))) or (name in WITHOUT_EFFECT and is_number(value)):
            continue
        other = OTHER_NAMES.get(name)
        hint = f"; here it is called {other}" if other else ""
        if name not in NEUTRAL and name not in WITHOUT_EFFECT:
            hint = hint or nearest(name, [*known, *NEUTRAL])
            raise bad_request(f"{name!r} is unknown{hint}", name, "unknown_parameter")
        message = f"{name!r} is not supported by this server{hint or '; leave it out'}"
        raise bad_request(message, name, "unsupported_parameter")


def check_message_names(extra: Mapping[str, Any], place: str) -> None:
    """The same for one message; `place` is such as messages[0]."""
    for name, value in extra.items():
        if not is_neutral(value, NEUTRAL_IN_MESSAGE.get(name, (None,))):
            raise bad_request(f"{name!r} of a message is not supported", f"{place}.{name}", "unsupported_parameter")


def is_neutral(value: Any, neutral: tuple[Any, ...]) -> bool:
    """Whether the value is one of these; False is not 0 here, and True is not 1."""
    return any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in neutral)


def is_number(value: Any) -> bool:
    """True for JSON's numbers."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def close_request(schema: dict[str, Any]) -> None:
    """Say in the OpenAPI document what `check_names` does: other names are refused, neutral values are not."""
    schema["additionalProperties"] = False
    for name, values in NEUTRAL.items():
        note = {"description": "Not supported; only these values are taken.", "enum": list(values)}
        schema["properties"].setdefault(name, note)
    for name in WITHOUT_EFFECT:
        schema["properties"][name] = {"description": "Changes nothing.", "type": ["number", "null"]}


def close_message(schema: dict[str, Any]) -> None:
    """The same for one message."""
    schema["additionalProperties"] = False
    for name, values in NEUTRAL_IN_MESSAGE.items():
        schema["properties"].setdefault(name, {"description": "Not supported.", "enum": list(values)})
