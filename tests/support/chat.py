"""A small tokenizer for chat templates, and conversations as tokens, the trained ones marked."""

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from cola_ds.data.chat import ChatTemplate
from cola_ds.data.conversations import Columns, conversation_of

TEMPLATES = Path(__file__).resolve().parents[1] / "data/templates"
_WORDS = ["user", "assistant", "system", "tool", "model", "ipython", "Hi", "Hello", "Bye", "Be", "Ġkind", "Ġthere"]
_WORDS += ["sun", "think"]
_SPECIAL = {
    "chatml": ["<|im_start|>", "<|im_end|>", "<|endoftext|>"],
    "llama3": ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
    "mistral": ["<s>", "</s>", "[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]"],
    "gemma": ["<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"],
}
_SPECIAL["mistral"] += ["[TOOL_RESULTS]", "[/TOOL_RESULTS]"]
_ENDS = {
    "chatml": (None, "<|im_end|>"),
    "llama3": ("<|begin_of_text|>", "<|eot_id|>"),
    "mistral": ("<s>", "</s>"),
    "gemma": ("<bos>", "<eos>"),
}


def template_text(name):
    """The template of a file of tests/data/templates."""
    return (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")


def chat_tokenizer(name, template=None, trim_offsets=False):
    """A byte-level BPE of bytes and a few words, with the special tokens and BOS as those of chatml, llama3, mistral or gemma."""
    vocabulary = {byte: index for index, byte in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    merges = []
    for word in _WORDS:
        for end in range(2, len(word) + 1):
            if word[:end] not in vocabulary:
                vocabulary[word[:end]] = len(vocabulary)
                merges.append((word[: end - 1], word[end - 1]))
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = _SPECIAL[name]
    tokenizer.add_special_tokens(special)
    bos, eos = _ENDS[name]
    after = [processors.ByteLevel(trim_offsets=trim_offsets)]
    if bos:
        after.append(
            processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))])
        )
    tokenizer.post_processor = processors.Sequence(after)
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=bos, eos_token=eos, extra_special_tokens=special, name_or_path=f"a/{name}"
    )
    made.chat_template = template_text(template or name)
    return made


def marked(tokenizer, rendered):
    """The tokens of an example with a space between, the trained ones behind a star."""
    tokens = tokenizer.convert_ids_to_tokens(rendered.ids)
    for first, last in rendered.spans:
        tokens[first:last] = [f"*{token}" for token in tokens[first:last]]
    return " ".join(tokens)


def conversation(*messages, tools=None, **row):
    """The conversation of messages, each a (role, content) or a dict."""
    made = [each if isinstance(each, dict) else {"role": each[0], "content": each[1]} for each in messages]
    return conversation_of("t.jsonl:1", {"messages": made, **row}, Columns(), None, tools)


def encoded(name, *messages, loss_on="assistant", template=None, tools=None):
    """The marked tokens of each example of a conversation, and what was noted; the ids are those that Transformers makes."""
    tokenizer = chat_tokenizer(name, template)
    chat = ChatTemplate(tokenizer, None, loss_on)
    talk = conversation(*messages, tools=tools)
    found = chat.encode("t.jsonl:1", talk)
    if len(found) == 1:
        assert found[0].ids == tokenizer.apply_chat_template(talk.messages, tools=tools)["input_ids"]
    return [marked(tokenizer, each) for each in found], dict(chat.notes)
