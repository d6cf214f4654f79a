"""Chat templates like well-known ones (for text, without tools), and tokenizers for them: a small one, or the real
vocabulary with other special tokens."""

import json
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

CHATML = (
    "{% for m in messages %}{% if loop.first and m.role != 'system' %}"
    "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n{% endif %}"
    "{% if m.role in ['system', 'user', 'assistant'] %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Drops the thinking, opens <think> in the generation prompt, and keeps only one system message.
DEEPSEEK = (
    "{{ bos_token }}{% set ns = namespace(system='') %}{% for m in messages %}{% if m.role == 'system' %}"
    "{% set ns.system = m.content %}{% endif %}{% endfor %}{{ ns.system }}{% for m in messages %}"
    "{% if m.role == 'user' %}<｜User｜>{{ m.content }}{% elif m.role == 'assistant' %}"
    "<｜Assistant｜>{{ m.content.split('</think>')[-1] }}<｜end▁of▁sentence｜>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<｜Assistant｜><think>\n{% endif %}"
)
# Removes the thinking from the content, and writes it, or an empty block, after the last question only.
QWEN3 = (
    "{% set ns = namespace(last=messages|length) %}{% for m in messages %}{% if m.role == 'user' %}"
    "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}{% for m in messages %}{% set c = m.content %}"
    "{% if m.role == 'assistant' %}{% set t = m.reasoning_content or '' %}{% if not t and '</think>' in c %}"
    "{% set t = c.split('</think>')[0].split('<think>')[-1] %}{% set c = c.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{% if loop.index0 > ns.last %}{% set c = '<think>\n' + t.strip('\n') + '\n</think>\n\n' + c.lstrip('\n') %}"
    "{% endif %}{% endif %}<|im_start|>{{ m.role }}\n{{ c }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QWEN3_THINKING = QWEN3.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
QWEN3_NOT_THINKING = QWEN3.replace("assistant\n{% endif %}", "assistant\n<think>\n\n</think>\n\n{% endif %}")
# Qwen2.5-Math's system message, up to the user's first word, and what comes between a question and its answer: token ids.
SYSTEM_IDS = [151644, 8948, 198, 5501, 2874, 3019, 553, 3019, 11, 323, 2182, 697, 1590, 4226, 2878, 1124, 79075, 46391]
SYSTEM_IDS += [151645, 198, 151644, 872, 198]
ANSWER_IDS = [151645, 198, 151644, 77091, 198]
_QWEN = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
_DEEPSEEK = {
    "bos_token": "<｜begin▁of▁sentence｜>",
    "eos_token": "<｜end▁of▁sentence｜>",
    "pad_token": "<｜end▁of▁sentence｜>",
}
# Template, special tokens, and the ids that these get on top of Qwen2.5's vocabulary.
FAMILIES = {
    "qwen2.5-instruct": (CHATML, _QWEN, {}),
    "qwen3": (
        QWEN3,
        _QWEN,
        {151665: "<tool_response>", 151666: "</tool_response>", 151667: "<think>", 151668: "</think>"},
    ),
    "deepseek-r1-distill-qwen": (
        DEEPSEEK,
        _DEEPSEEK,
        {
            151643: "<｜end▁of▁sentence｜>",
            151644: "<｜User｜>",
            151645: "<｜Assistant｜>",
            151646: "<｜begin▁of▁sentence｜>",
            151648: "<think>",
            151649: "</think>",
        },
    ),
}
MARKS = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<think>",
    "</think>",
    *FAMILIES["deepseek-r1-distill-qwen"][2].values(),
]


def small_folder(folder: Path, template: str, **config: str | bool | None) -> Path:
    """A tokenizer whose ordinary tokens are bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(models.BPE({byte: i for i, byte in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(dict.fromkeys(MARKS)))
    backend.save(str(folder / "tokenizer.json"))
    config = {**(_DEEPSEEK if template == DEEPSEEK else _QWEN), "chat_template": template, **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def real_folder(folder: Path, shared: Path, family: str) -> Path:
    """Qwen2.5's vocabulary with a family's template and names."""
    template, special, names = FAMILIES[family]
    backend = json.loads((shared / "qwen2.5-tokenizer" / "tokenizer.json").read_text())
    added = {token["id"]: token for token in backend["added_tokens"]}
    for i, name in names.items():
        added[i] = {**added.get(i, {**added[151657], "id": i}), "content": name}
    backend["added_tokens"] = [added[i] for i in sorted(added)]
    (folder / "tokenizer.json").write_text(json.dumps(backend))
    (folder / "tokenizer_config.json").write_text(json.dumps({**special, "chat_template": template}))
    return folder
