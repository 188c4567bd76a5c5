"""The tool and thought branches of public chat templates in a few lines each, written for these tests.

What they share with the originals: where tools are listed, how calls and results are written, what they refuse, and
what becomes of thoughts.
"""

from __future__ import annotations

_HERMES_TOOLS = """
{%- if tools -%}
{{- '<|im_start|>system\\n' + (messages[0]['content'] + '\\n\\n' if messages[0]['role'] == 'system' else '') -}}
{{- '# Tools\\n<tools>' -}}
{%- for tool in tools -%}{{- '\\n' + (tool | tojson) -}}{%- endfor -%}
{{- '\\n</tools>\\nAnswer with <tool_call></tool_call>.<|im_end|>\\n' -}}
{%- elif messages[0]['role'] == 'system' -%}
{{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' -}}
{%- endif -%}
"""
_HERMES_CALLS = """
{%- for call in m.tool_calls -%}
{%- if (loop.first and content) or not loop.first -%}{{- '\\n' -}}{%- endif -%}
{%- set call = call.function or call -%}
{{- '<tool_call>\\n{"name": "' + call.name + '", "arguments": ' + (call.arguments | tojson) + '}\\n</tool_call>' -}}
{%- endfor -%}
"""
_HERMES_RESULTS = """
{{- '<|im_start|>user' if loop.first or messages[loop.index0 - 1].role != 'tool' else '' -}}
{{- '\\n<tool_response>\\n' + m.content + '\\n</tool_response>' -}}
{{- '<|im_end|>\\n' if loop.last or messages[loop.index0 + 1].role != 'tool' else '' -}}
"""
_QWEN_2_5 = (
    _HERMES_TOOLS
    + """
{%- for m in messages -%}
{%- if m.role == 'user' or (m.role == 'system' and not loop.first) or (m.role == 'assistant' and not m.tool_calls) -%}
{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' -}}
{%- elif m.role == 'assistant' -%}
{%- set content = m.content -%}
{{- '<|im_start|>assistant\\n' + (content or '') -}}
"""
    + _HERMES_CALLS
    + "{{- '<|im_end|>\\n' -}}{%- elif m.role == 'tool' -%}"
    + _HERMES_RESULTS
    + """
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""
)
# Thoughts of answers before the last question go, results of tools are no questions; the last one always has a thought.
_QWEN_3 = (
    _HERMES_TOOLS
    + """
{%- set ns = namespace(last=0) -%}
{%- for m in messages -%}{%- if m.role == 'user' -%}{%- set ns.last = loop.index0 -%}{%- endif -%}{%- endfor -%}
{%- for m in messages -%}
{%- if m.role == 'user' or (m.role == 'system' and not loop.first) -%}
{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' -}}
{%- elif m.role == 'assistant' -%}
{%- set content = m.content if m.content is string else '' -%}
{%- set thought = '' -%}
{%- if m.reasoning_content is string -%}
{%- set thought = m.reasoning_content -%}
{%- elif '</think>' in content -%}
{%- set thought = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') -%}
{%- set content = content.split('</think>')[-1].lstrip('\\n') -%}
{%- endif -%}
{{- '<|im_start|>assistant\\n' -}}
{%- if loop.index0 > ns.last and (loop.last or thought) -%}
{{- '<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' -}}
{%- endif -%}
{{- content -}}
"""
    + _HERMES_CALLS
    + "{{- '<|im_end|>\\n' -}}{%- elif m.role == 'tool' -%}"
    + _HERMES_RESULTS
    + """
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' + ('<think>\\n\\n</think>\\n\\n' if enable_thinking is false else '') -}}
{%- endif -%}
"""
)
_HERMES = (
    _QWEN_2_5.replace("(m.role == 'system' and not loop.first)", "m.role == 'system'")
    .replace("(messages[0]['content'] + '\\n\\n' if messages[0]['role'] == 'system' else '')", "''")
    .replace("{%- elif messages[0]['role'] == 'system' -%}", "{%- elif false -%}")
    .replace("<|im_start|>user' if", "<|im_start|>tool' if")
)
# Tools in the first question; one call at a time; results as JSON texts.
_LLAMA_3_1 = """
{{- bos_token -}}
{%- set system = '' -%}
{%- if messages[0]['role'] == 'system' -%}
{%- set system = messages[0]['content'] | trim -%}{%- set messages = messages[1:] -%}
{%- endif -%}
{{- '<|start_header_id|>system<|end_header_id|>\\n\\n' -}}
{%- if tools is not none -%}{{- 'Environment: ipython\\n' -}}{%- endif -%}
{{- 'Cutting Knowledge Date: December 2023\\n\\n' + system + '<|eot_id|>' -}}
{%- if tools is not none -%}
{%- set question = messages[0]['content'] | trim -%}{%- set messages = messages[1:] -%}
{{- '<|start_header_id|>user<|end_header_id|>\\n\\nGiven the following functions\\n\\n' -}}
{%- for t in tools -%}{{- (t | tojson(indent=4)) + '\\n\\n' -}}{%- endfor -%}
{{- question + '<|eot_id|>' -}}
{%- endif -%}
{%- for m in messages -%}
{%- if not (m.role == 'ipython' or m.role == 'tool' or 'tool_calls' in m) -%}
{{- '<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n' + m['content'] | trim + '<|eot_id|>' -}}
{%- elif 'tool_calls' in m -%}
{%- if not m.tool_calls | length == 1 -%}
{{- raise_exception('This model only supports single tool-calls at once!') -}}
{%- endif -%}
{%- set call = m.tool_calls[0].function -%}
{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n{"name": "' + call.name + '", "parameters": ' -}}
{{- (call.arguments | tojson) + '}<|eot_id|>' -}}
{%- else -%}
{{- '<|start_header_id|>ipython<|end_header_id|>\\n\\n' -}}
{{- (m.content | tojson if m.content is mapping or m.content is iterable else m.content) + '<|eot_id|>' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}{%- endif -%}
"""
# Ids of nine characters; tools in front of the last question.
_MISTRAL = """
{%- if messages[0]['role'] == 'system' -%}
{%- set system = messages[0]['content'] + '\\n\\n' -%}{%- set messages = messages[1:] -%}
{%- endif -%}
{%- set last = (messages | selectattr('role', 'equalto', 'user') | list)[-1] -%}
{{- bos_token -}}
{%- for m in messages -%}
{%- if m['role'] == 'user' -%}
{%- if tools is not none and m == last -%}
{{- '[AVAILABLE_TOOLS] [' -}}
{%- for t in tools -%}{{- t | tojson -}}{{- ', ' if not loop.last else '' -}}{%- endfor -%}
{{- '][/AVAILABLE_TOOLS]' -}}
{%- endif -%}
{{- '[INST] ' + (system if m == last and system is defined else '') + m['content'] + '[/INST]' -}}
{%- elif m.tool_calls is defined and m.tool_calls is not none -%}
{{- '[TOOL_CALLS] [' -}}
{%- for call in m.tool_calls -%}
{%- set out = call.function | tojson -%}
{{- out[:-1] -}}
{%- if not call.id is defined or call.id | length != 9 -%}
{{- raise_exception('Tool call IDs should be alphanumeric strings with length 9!') -}}
{%- endif -%}
{{- ', "id": "' + call.id + '"}' + (', ' if not loop.last else ']' + eos_token) -}}
{%- endfor -%}
{%- elif m['role'] == 'assistant' -%}
{{- ' ' + m['content'] | trim + eos_token -}}
{%- elif m['role'] == 'tool' -%}
{%- if not m.tool_call_id is defined or m.tool_call_id | length != 9 -%}
{{- raise_exception('Tool call IDs should be alphanumeric strings with length 9!') -}}
{%- endif -%}
{{- '[TOOL_RESULTS] {"content": ' + m.content | string + ', "call_id": "' + m.tool_call_id + '"}[/TOOL_RESULTS]' -}}
{%- endif -%}
{%- endfor -%}
"""
# Opens a thought in the generation prompt, drops those of history, takes arguments as text, and lists no tools.
_DEEPSEEK_R1 = """
{{- bos_token -}}
{%- set ns = namespace(is_tool=false) -%}
{%- for m in messages -%}{%- if m['role'] == 'system' -%}{{- m['content'] -}}{%- endif -%}{%- endfor -%}
{%- for m in messages -%}
{%- if m['role'] == 'user' -%}
{%- set ns.is_tool = false -%}
{{- '<｜User｜>' + m['content'] -}}
{%- elif m['role'] == 'assistant' and 'tool_calls' in m -%}
{{- '<｜Assistant｜>' + (m['content'] or '') + '<｜tool▁calls▁begin｜>' -}}
{%- for tool in m['tool_calls'] -%}
{{- '<｜tool▁call▁begin｜>' + tool['type'] + '<｜tool▁sep｜>' + tool['function']['name'] + '\\n```json\\n' -}}
{{- tool['function']['arguments'] + '\\n```<｜tool▁call▁end｜>' -}}
{%- endfor -%}
{{- '<｜tool▁calls▁end｜>' + eos_token -}}
{%- elif m['role'] == 'tool' -%}
{{- ('<｜tool▁outputs▁begin｜>' if not ns.is_tool else '\\n') + '<｜tool▁output▁begin｜>' + m['content'] -}}
{{- '<｜tool▁output▁end｜>' -}}
{%- set ns.is_tool = true -%}
{%- elif m['role'] == 'assistant' -%}
{{- '<｜tool▁outputs▁end｜>' if ns.is_tool else '<｜Assistant｜>' -}}
{{- m['content'].split('</think>')[-1] + eos_token -}}
{%- set ns.is_tool = false -%}
{%- endif -%}
{%- endfor -%}
{{- '<｜tool▁outputs▁end｜>' if ns.is_tool else '' -}}
{%- if add_generation_prompt and not ns.is_tool -%}{{- '<｜Assistant｜><think>\\n' -}}{%- endif -%}
"""
# A thought has a channel and a key of its own; a call ends with a token of its own.
_GPT_OSS = """
{{- '<|start|>system<|message|>You help.' -}}
{%- for tool in tools or [] -%}{{- '\\ntype ' + tool.function.name -}}{%- endfor -%}
{{- '<|end|>' -}}
{%- for m in messages -%}
{%- if m.role == 'assistant' and m.tool_calls -%}
{%- if m.thinking -%}
{{- '<|start|>assistant<|channel|>analysis<|message|>' + m.thinking + '<|end|>' -}}
{%- endif -%}
{{- '<|start|>assistant to=functions.' + m.tool_calls[0].function.name + '<|channel|>commentary json<|message|>' -}}
{{- (m.tool_calls[0].function.arguments | tojson) + '<|call|>' -}}
{%- elif m.role == 'assistant' -%}
{%- set is_last = loop.last and not add_generation_prompt -%}
{%- if is_last and m.thinking -%}
{{- '<|start|>assistant<|channel|>analysis<|message|>' + m.thinking + '<|end|>' -}}
{%- endif -%}
{{- '<|start|>assistant<|channel|>final<|message|>' + m.content + ('<|return|>' if is_last else '<|end|>') -}}
{%- elif m.role == 'tool' -%}
{{- '<|start|>functions to=assistant<|channel|>commentary<|message|>' + (m.content | tojson) + '<|end|>' -}}
{%- else -%}
{{- '<|start|>' + m.role + '<|message|>' + m.content + '<|end|>' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|start|>assistant' -}}{%- endif -%}
"""

TOOL_TEMPLATES: dict[str, str] = {
    "qwen-2.5": _QWEN_2_5,
    "qwen-3": _QWEN_3,
    "qwen-3-thinking": _QWEN_3.replace(
        "('<think>\\n\\n</think>\\n\\n' if enable_thinking is false else '')", "'<think>\\n'"
    ),
    "hermes": _HERMES,
    "llama-3.1": _LLAMA_3_1,
    "mistral": _MISTRAL,
    "deepseek-r1": _DEEPSEEK_R1,
    "gpt-oss": _GPT_OSS,
}
