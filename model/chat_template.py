"""The layout of `model.chat` as a Jinja chat template, for tools that know nothing of this project.

`tokenizer.apply_chat_template` renders the same ids as `render_chat`, and returns the same loss mask on request
(`return_assistant_tokens_mask`, trl's `assistant_only_loss`). A single string cannot preserve two things: text that
spells a control token becomes one, and leading white space of a content may merge with the newline before it.

Beyond what `render_chat` takes it accepts what clients send: content that is null or a list of text parts, `developer`
for system, a thought in `reasoning_content`. What it cannot render is refused by name.
"""

import json
import re

from transformers import PreTrainedTokenizerBase

from model.chat import DEFAULT_SYSTEM_PROMPT
from model.template_chat import lays_out_thinking
from model.tool_calls import LISTING_HEAD, LISTING_TAIL

CHAT_TEMPLATE = (
    "{%- set default_system_prompt = '"
    + DEFAULT_SYSTEM_PROMPT
    + "' -%}\n{%- set listing_head = "
    + json.dumps(LISTING_HEAD, ensure_ascii=False)
    + " -%}\n{%- set listing_tail = "
    + json.dumps(LISTING_TAIL, ensure_ascii=False)
    + r""" -%}

{%- macro text_of(content) -%}
    {%- if content is string -%}
        {{- content -}}
    {%- elif content is none or content is not defined -%}
    {%- elif content is mapping or content is not iterable -%}
        {{- raise_exception("the content of a turn must be text, null or a list of parts, not " ~ content) -}}
    {%- else -%}
        {%- for part in content -%}
            {%- if part['type'] == 'text' and part['text'] is string -%}
                {{- part['text'] -}}
            {%- else -%}
                {{- raise_exception("this model takes text only, not parts of type '" ~ part['type'] ~ "'") -}}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
{%- endmacro -%}

{%- macro answer_of(message) -%}
    {%- set content = text_of(message['content']) -%}
    {%- set thought = text_of(message['reasoning_content']) -%}
    {%- set calls = message['tool_calls'] or [] -%}
    {%- if not thought -%}
        {{- content -}}
    {%- else -%}
        {{- '<think>\n' ~ thought ~ '\n</think>' -}}
        {%- if content or not calls -%}
            {{- '\n<answer>\n' ~ content ~ '\n</answer>' -}}
        {%- endif -%}
    {%- endif -%}
    {%- for call in calls -%}
        {%- set function = call['function'] or call -%}
        {%- set arguments = function['arguments'] -%}
        {{- '\n' if content or thought or not loop.first else '' -}}
        {{- '<tool_call>\n{"name": ' ~ function['name'] | tojson ~ ', "arguments": ' -}}
        {{- (arguments if arguments is string else arguments | tojson) ~ '}\n</tool_call>' -}}
    {%- endfor -%}
{%- endmacro -%}

{%- macro listing() -%}
    {%- if tools -%}
        {{- listing_head -}}
        {%- for tool in tools -%}
            {{- '\n' ~ (tool['function'] or tool) | tojson -}}
        {%- endfor -%}
        {{- listing_tail -}}
    {%- endif -%}
{%- endmacro -%}

{%- if not messages or messages[0]['role'] not in ['system', 'developer'] -%}
    {{- bos_token ~ 'system\n' ~ default_system_prompt ~ listing() ~ eos_token ~ '\n' -}}
{%- endif -%}
{%- for message in messages -%}
    {%- set role = 'system' if message['role'] == 'developer' else message['role'] -%}
    {%- if role not in ['system', 'user', 'assistant', 'tool'] -%}
        {{- raise_exception("unknown role '" ~ role ~ "': use system, developer, user, assistant or tool") -}}
    {%- endif -%}
    {{- bos_token ~ role ~ '\n' -}}
    {%- if role == 'assistant' -%}
        {%- generation -%}
            {{- answer_of(message) ~ eos_token -}}
        {%- endgeneration -%}
    {%- else -%}
        {{- text_of(message['content']) ~ (listing() if loop.first and role == 'system' else '') ~ eos_token -}}
    {%- endif -%}
    {{- '\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- bos_token ~ 'assistant\n' -}}
{%- endif -%}
"""
)


def chat_template_of(tokenizer: PreTrainedTokenizerBase) -> str:
    """The chat template of a model with this tokenizer: the tokenizer's own if it is MiniMind-3's, else ours."""
    return tokenizer.chat_template if lays_out_thinking(tokenizer) else CHAT_TEMPLATE


def without_generation_marks(template: str) -> str:
    """A chat template in plain Jinja, without `{% generation %}`; it renders to the same text."""
    plain = re.sub(r"(\{%[-+]?\s*)generation(\s*[-+]?%\})", r"\1if true\2", template)
    return re.sub(r"(\{%[-+]?\s*)endgeneration(\s*[-+]?%\})", r"\1endif\2", plain)
