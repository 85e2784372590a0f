"""Tokenizers whose every token can be foretold: bytes with three merges, and whole words."""

from __future__ import annotations

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

SPECIAL = ["<s>", "</s>", "<|user|>", "<|assistant|>", "<|end|>"]
BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
MERGES = [("Ġ", "w"), ("a", "b"), ("1", "2")]
VOCAB = {token: index for index, token in enumerate([*SPECIAL, *BYTES, *("".join(pair) for pair in MERGES)])}
CHAT = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TAGGED_CHAT = (
    "{% for message in messages %}<|{{ message['role'] }}|>{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] }}{% endgeneration %}{% else %}{{ message['content'] }}{% endif %}<|end|>"
    "{% endfor %}"
)


def byte_tokenizer(template: str | None = None, *, before: str = "<s>", after: str = "") -> PreTrainedTokenizerFast:
    """Bytes with three merges; puts ``before`` and ``after`` around a text."""
    backend = Tokenizer(models.BPE(VOCAB, MERGES))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    backend.post_processor = processors.TemplateProcessing(
        single=f"{before} $A {after}".strip(), special_tokens=[(token, VOCAB[token]) for token in SPECIAL[:2]]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", chat_template=template)


def word_tokenizer(template: str) -> PreTrainedTokenizerFast:
    """Whole words; spaces lie in no token."""
    words = ["?", *SPECIAL, "hi", "there", "yes", "no", "so"]
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="?", chat_template=template)


TOKENIZER = byte_tokenizer()
CHATTER = byte_tokenizer(CHAT)
