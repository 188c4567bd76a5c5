"""The logic of public chat templates in a few lines each, written for these tests.

What they share with the originals: control tokens, blanks, who writes BOS, who trims, what history loses.
"""

from __future__ import annotations


def _blocks(role: str, after: str, end: str, *, content: str = "m['content']", head: str = "assistant") -> str:
    """As ChatML and many others: role, content and end of each message, then the head of the answer."""
    return f"""
{{%- for m in messages -%}}
{{{{- '{role}' + m['role'] + '{after}' + {content} + '{end}' -}}}}
{{%- endfor -%}}
{{%- if add_generation_prompt -%}}
{{{{- '{role}{head}{after}' -}}}}
{{%- endif -%}}
"""


def _instructions(answer: str, *, question: str, before: str = "{{- bos_token -}}") -> str:
    """As Llama 2 and Mistral: the system text inside the first question, no generation prompt."""
    return f"""
{before}
{{%- set ns = namespace(system='') -%}}
{{%- for m in messages -%}}
{{%- if m['role'] == 'system' -%}}
{{%- set ns.system = '<<SYS>>\\n' + m['content'] + '\\n<</SYS>>\\n\\n' -%}}
{{%- elif m['role'] == 'user' -%}}
{{{{- {question} -}}}}
{{%- set ns.system = '' -%}}
{{%- else -%}}
{{{{- {answer} -}}}}
{{%- endif -%}}
{{%- endfor -%}}
"""


_BOS = "{{- bos_token -}}"
_CHATML = _blocks("<|im_start|>", "\\n", "<|im_end|>\\n")
_LLAMA_3 = _blocks("<|start_header_id|>", "<|end_header_id|>\\n\\n", "<|eot_id|>", content="m['content'] | trim")
_SYSTEM_MISSING = (
    "{%- if messages[0]['role'] != 'system' -%}{{- '<|im_start|>system\\nYou help.<|im_end|>\\n' -}}{%- endif -%}"
)
_GEMMA = """
{%- for m in messages -%}
{{- '<start_of_turn>' + ('model' if m['role'] == 'assistant' else 'user') + '\\n' -}}
{{- m['content'] | trim + '<end_of_turn>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<start_of_turn>model\\n' -}}
{%- endif -%}
"""
# Thoughts before the last question are dropped; the last answer always has one, if need be an empty one.
_QWEN_3 = """
{%- set ns = namespace(last=0) -%}
{%- for m in messages -%}
{%- if m['role'] == 'user' -%}
{%- set ns.last = loop.index0 -%}
{%- endif -%}
{%- endfor -%}
{%- for m in messages -%}
{%- if m['role'] == 'assistant' -%}
{%- set thought = '' -%}
{%- set content = m['content'] -%}
{%- if '</think>' in content -%}
{%- set thought = content.split('</think>')[0].split('<think>')[-1].strip('\\n') -%}
{%- set content = content.split('</think>')[-1].lstrip('\\n') -%}
{%- endif -%}
{{- '<|im_start|>assistant\\n' -}}
{%- if loop.index0 > ns.last and (loop.last or thought) -%}
{{- '<think>\\n' + thought + '\\n</think>\\n\\n' -}}
{%- endif -%}
{{- content + '<|im_end|>\\n' -}}
{%- else -%}
{{- '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
"""
_NO_SYSTEM = """
{%- if messages[0]['role'] == 'system' -%}
{{- raise_exception('System role not supported') -}}
{%- endif -%}
"""
_TODAY = """
{{- '<|start_header_id|>system<|end_header_id|>\\n\\nToday Date: ' + strftime_now('%d %b %Y') + '<|eot_id|>' -}}
"""
_ZEPHYR = """
{%- for m in messages -%}
{{- '<|' + m['role'] + '|>\\n' + m['content'] + eos_token + '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|assistant|>\\n' -}}
{%- endif -%}
"""
# eos closes the text only when nothing follows.
_PHI_3 = """
{%- for m in messages -%}
{{- '<|' + m['role'] + '|>\\n' + m['content'] + '<|end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|assistant|>\\n' -}}
{%- else -%}
{{- eos_token -}}
{%- endif -%}
"""
# The last answer ends with another token than those of history, and the model names its channel itself.
_GPT_OSS = """
{{- '<|start|>system<|message|>You are helpful.\\nCurrent date: ' + strftime_now('%Y-%m-%d') + '<|end|>' -}}
{%- for m in messages -%}
{%- if m['role'] == 'assistant' -%}
{{- '<|start|>assistant<|channel|>final<|message|>' + m['content'] -}}
{{- '<|return|>' if loop.last and not add_generation_prompt else '<|end|>' -}}
{%- else -%}
{{- '<|start|>' + m['role'] + '<|message|>' + m['content'] + '<|end|>' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|start|>assistant' -}}
{%- endif -%}
"""
# Opens a thought in the generation prompt, and drops all thoughts from history.
_DEEPSEEK_R1 = """
{{- bos_token -}}
{%- for m in messages -%}
{%- if m['role'] == 'system' -%}
{{- m['content'] -}}
{%- elif m['role'] == 'user' -%}
{{- '<｜User｜>' + m['content'] -}}
{%- else -%}
{{- '<｜Assistant｜>' + m['content'].split('</think>')[-1] + eos_token -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<｜Assistant｜><think>\\n' -}}
{%- endif -%}
"""
_OPENCHAT = """
{{- bos_token -}}
{%- for m in messages -%}
{{- 'GPT4 Correct ' + m['role'] | title + ': ' + m['content'] + '<|end_of_turn|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- 'GPT4 Correct Assistant:' -}}
{%- endif -%}
"""
_VICUNA = """
{{- bos_token -}}
{{- 'A chat. ' -}}
{%- for m in messages -%}
{%- if m['role'] == 'user' -%}
{{- 'USER: ' + m['content'] + ' ' -}}
{%- elif m['role'] == 'assistant' -%}
{{- 'ASSISTANT: ' + m['content'] + eos_token -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- 'ASSISTANT:' -}}
{%- endif -%}
"""
_COMMAND_R = """
{{- bos_token -}}
{%- for m in messages -%}
{{- '<|START_OF_TURN_TOKEN|>' + ('<|CHATBOT_TOKEN|>' if m['role'] == 'assistant' else '<|USER_TOKEN|>') -}}
{{- m['content'].strip() + '<|END_OF_TURN_TOKEN|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' -}}
{%- endif -%}
"""
_OLMO = """
{{- bos_token -}}
{%- for m in messages -%}
{{- '<|' + m['role'] + '|>\\n' + m['content'] -}}
{{- eos_token if loop.last and m['role'] == 'assistant' else '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|assistant|>\\n' -}}
{%- endif -%}
"""
_FALCON = """
{%- for m in messages -%}
{{- '\\n' if not loop.first else '' -}}
{{- m['role'] | title + ': ' + m['content'].strip() -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '\\nAssistant:' -}}
{%- endif -%}
"""
# Neither a generation prompt nor BOS at the very front.
_PLAIN = """
{{- '\\n' -}}
{{- bos_token -}}
{%- for m in messages -%}
{{- m['role'] + ': ' + m['content'] + eos_token -}}
{%- endfor -%}
"""

TEMPLATES: dict[str, str] = {
    "chatml": _CHATML,
    "yi": _CHATML.replace("m['content']", "m['content'] | string"),
    "qwen-2.5": _SYSTEM_MISSING + _CHATML,
    "qwen-3": _QWEN_3 + "{%- endif -%}",
    "qwen-3-thinking": _QWEN_3 + "{{- '<think>\\n' -}}{%- endif -%}",
    "internlm-2": _BOS + _CHATML,
    "smollm-2": _SYSTEM_MISSING.replace("help", "are small") + _CHATML,
    "llama-2": _instructions(
        "' ' + m['content'] | trim + ' ' + eos_token",
        question="(bos_token or '') + '[INST] ' + ns.system + m['content'] + ' [/INST]'",
        before="",
    ),
    "llama-3": _BOS + _LLAMA_3,
    "llama-3.2": _BOS + _TODAY + _LLAMA_3,
    "mistral-1": _instructions(
        "m['content'] + eos_token", question="'[INST] ' + ns.system + m['content'] + ' [/INST]'"
    ),
    "mistral-3": _instructions(
        "' ' + m['content'] | trim + eos_token", question="'[INST] ' + ns.system + m['content'] + '[/INST]'"
    ),
    "mistral-tekken": _instructions(
        "m['content'] + eos_token", question="'[INST]' + ns.system + m['content'] + '[/INST]'"
    ),
    "zephyr": _ZEPHYR,
    "tinyllama": _ZEPHYR.replace("eos_token + '\\n'", "eos_token + ('' if loop.last else '\\n')"),
    "phi-3": _PHI_3,
    "phi-4": _blocks("<|im_start|>", "<|im_sep|>", "<|im_end|>"),
    "gemma": _BOS + _NO_SYSTEM + _GEMMA,
    "gemma-3": _BOS + _GEMMA,
    "granite": _blocks("<|start_of_role|>", "<|end_of_role|>", "<|endoftext|>\\n"),
    "gpt-oss": _GPT_OSS,
    "deepseek-r1": _DEEPSEEK_R1,
    "openchat": _OPENCHAT,
    "vicuna": _VICUNA,
    "command-r": _COMMAND_R,
    "olmo": _OLMO,
    "falcon": _FALCON,
    "no-generation-prompt": _PLAIN,
}
