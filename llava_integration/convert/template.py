"""The prompt that LLaVA-1.5 and LLaVA-STF were trained on, Vicuna v1, as a Jinja chat template.

    SYSTEM USER: <image>\nquestion ASSISTANT: answer</s>USER: question ASSISTANT:

Roles "system", "user", "assistant"; images of a message go in front of its text, one per line.
"""

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)

VICUNA_V1 = (
    "{%- macro words(content) -%}"
    "{%- if content is string -%}{{- content -}}{%- else -%}"
    "{%- for part in content if part['type'] in ('image', 'video') -%}{{- '<image>\\n' -}}{%- endfor -%}"
    "{%- for part in content if part['type'] == 'text' -%}{{- part['text'] -}}{%- endfor -%}"
    "{%- endif -%}{%- endmacro -%}"
    "{%- if messages[0]['role'] != 'system' -%}{{- " + repr(SYSTEM) + " + ' ' -}}{%- endif -%}"
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'system' -%}{{- words(message['content']) + ' ' -}}"
    "{%- elif message['role'] == 'user' -%}{{- 'USER: ' + words(message['content']) + ' ' -}}"
    "{%- elif message['role'] == 'assistant' -%}"
    "{{- 'ASSISTANT: ' + words(message['content']) + (eos_token or '</s>') -}}"
    "{%- else -%}{{- raise_exception('roles are system, user and assistant, got ' + message['role']) -}}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- 'ASSISTANT:' -}}{%- endif -%}"
)
