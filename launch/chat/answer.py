"""Print what a chat model answers to a question: the likeliest token at each place, so the same each time.

python launch/chat/answer.py MODEL QUESTION [MOST_TOKENS]
"""

import sys


def answer(path: str, question: str, most_tokens: int = 96) -> str:
    """The assistant's turn after the question, by the model's own chat template."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    said = model.generate(**asked, max_new_tokens=most_tokens, do_sample=False, pad_token_id=pad)
    return str(tokenizer.decode(said[0, asked["input_ids"].shape[1] :], skip_special_tokens=True)).strip()


if __name__ == "__main__":
    if len(sys.argv) not in (3, 4):
        sys.exit("usage: python launch/chat/answer.py MODEL QUESTION [MOST_TOKENS]")
    print(answer(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:])))
