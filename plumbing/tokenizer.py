"""Text to token ids and back: tiktoken for our own vocabularies, the library `tokenizers` for all others.

Both classes have the same few methods, so that no script needs to know which it has: n_vocab, eot (the id
before a text), mask (an id that no text has, or None), token_bytes (id -> bytes, empty for special tokens),
encode_ordinary(text), encode_ordinary_batch(texts), decode(ids).
"""
import base64
import hashlib
import json
import os
import re

import tiktoken
import tokenizers

from plumbing.files import read_json, reading

EOT, MASK = "<|endoftext|>", "<|mask|>"
LONG_SPACE = re.compile(r"(\s{10000})")  # a million spaces overflow the stack of the regex engines: cut them

class Tokenizer:
    """A byte-pair vocabulary of ours: ranks {bytes: id}, a pattern that cuts text, special tokens."""

    def __init__(self, ranks, pattern, special_tokens):
        self.ranks, self.pattern, self.special_tokens = ranks, pattern, special_tokens
        self.tiktoken = tiktoken.Encoding("corpus", pat_str=pattern, mergeable_ranks=ranks,
                                          special_tokens=special_tokens)
        self.eot, self.mask = special_tokens[EOT], special_tokens[MASK]
        self.n_vocab = len(ranks) + len(special_tokens)
        self.token_bytes = [b""] * self.n_vocab
        for token, rank in ranks.items():
            self.token_bytes[rank] = token

    def encode_ordinary(self, text):
        return [i for piece in LONG_SPACE.split(text) for i in self.tiktoken.encode_ordinary(piece)]

    def encode_ordinary_batch(self, texts):
        return [self.encode_ordinary(text) for text in texts]

    def decode(self, ids):
        return self.tiktoken.decode([i for i in ids if i < self.n_vocab])  # others only pad the vocabulary

class HubTokenizer(Tokenizer):
    """The tokenizer.json in a folder, as Hugging Face's library reads it."""

    def __init__(self, folder):
        with open(os.path.join(folder, "tokenizer.json"), encoding="utf8") as file:
            self.json = file.read()
        self.library = tokenizers.Tokenizer.from_str(self.json)
        self.library.encode_special_tokens = True  # written out in a text they are ordinary characters
        self.library.no_padding()
        self.library.no_truncation()
        tokens, added = self.library.get_vocab(), self.library.get_added_tokens_decoder()
        self.n_vocab = max(tokens.values()) + 1
        if self.n_vocab > len(self.json):  # a list of that length would take more memory than the file
            raise ValueError(f"its ids go up to {self.n_vocab - 1:,}, but it is too short for so many")
        self.token_bytes = [b""] * self.n_vocab
        for token, i in tokens.items():
            if i not in added:
                self.token_bytes[i] = bytes_of(token, '"ByteLevel"' in self.json)
            elif not added[i].special:
                self.token_bytes[i] = token.encode()
        self.eot_text = text_token(folder, tokens)
        self.eot = tokens[self.eot_text]
        masks = [tokens[name] for name in (MASK, "<mask>", "[MASK]") if name in tokens]
        masks += [i for i, token in enumerate(self.token_bytes) if token == b"\xff"]  # a byte of no text
        self.mask = masks[0] if masks else None

    def encode_ordinary(self, text):
        pieces = [self.library.encode(piece, add_special_tokens=False) for piece in LONG_SPACE.split(text)]
        return [i for piece in pieces for i in piece.ids]

    def decode(self, ids):
        return self.library.decode([i for i in ids if i < self.n_vocab], skip_special_tokens=False)

def load_tokenizer(folder):
    """The tokenizer in a folder: a tokenizer.json, or a corpus's tokenizer.tiktoken with meta.json."""
    path = os.path.join(folder, "tokenizer.json")
    if os.path.exists(path):
        with reading(path, "copy or download it again"):
            return HubTokenizer(folder)
    path, meta = os.path.join(folder, "tokenizer.tiktoken"), read_json(os.path.join(folder, "meta.json"))
    with reading(path, "prepare the corpus again with data/prepare.py"):
        content = open(path, "rb").read()
        if hashlib.sha256(content).hexdigest() != meta["sha256"]["tokenizer.tiktoken"]:
            raise ValueError("it does not match the sha256 in meta.json")
        pairs = [line.split() for line in content.splitlines()]
        ranks = {base64.b64decode(token): int(rank) for token, rank in pairs}
        ids = [*ranks.values(), *meta["special_tokens"].values()]
        if sorted(ids) != list(range(len(ids))):
            raise ValueError("its ids are not 0, 1, 2, ...")
        return Tokenizer(ranks, meta["pattern"], meta["special_tokens"])

def ranks_file(ranks):
    """The content of tokenizer.tiktoken."""
    return b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks.items())

def text_token(folder, tokens):
    """The token that stands before a text: the one that begins texts or, where none does, ends them."""
    for name in ("tokenizer_config.json", "generation_config.json", "config.json"):
        path = os.path.join(folder, name)
        settings = read_json(path) if os.path.exists(path) else {}
        for kind in ("bos_token", "eos_token"):
            token, number = settings.get(kind), settings.get(f"{kind}_id")
            token = token.get("content") if isinstance(token, dict) else token
            number = number[0] if isinstance(number, list) and number else number
            matching = [text for text, i in tokens.items() if text == token or i == number]
            if matching:
                return matching[0]
    raise ValueError("no tokenizer_config.json or config.json beside it names a bos_token or eos_token")

# --------------------------------------------------------------------------------------------------
# Hugging Face's dialect

PRINTABLE = [*range(ord("!"), 127), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), 256)]
LETTERS = {byte: chr(byte) for byte in PRINTABLE}  # for bytes in tokenizer.json, as GPT-2 chose them
LETTERS |= {byte: chr(256 + i) for i, byte in enumerate(sorted(set(range(256)) - set(PRINTABLE)))}
BYTE_OF = {letter: byte for byte, letter in LETTERS.items()}

def bytes_of(token, byte_level):
    """The bytes of a token in tokenizer.json, in GPT-2's letters or with SentencePiece's ▁ and <0x0A>."""
    if byte_level and set(token) <= set(BYTE_OF):
        return bytes(BYTE_OF[letter] for letter in token)
    if re.fullmatch(r"<0x[0-9A-F]{2}>", token):
        return bytes([int(token[3:5], 16)])
    return token.replace("▁", " ").encode("utf8", "replace")

def tokenizer_json(tokenizer):
    """A byte-level byte-pair encoder with the ids of our Tokenizer, as a dict for tokenizer.json.

    tiktoken joins whichever two neighbours make the token of the lowest rank, and takes a piece that is a
    token whole. So each way to cut a token into two tokens is a merge, in order of rank, with ignore_merges.
    """
    ranks, specials, merges = tokenizer.ranks, tokenizer.special_tokens, []
    written = {token: "".join(LETTERS[byte] for byte in token) for token in ranks}
    for token in sorted(ranks, key=ranks.get):
        cuts = [(token[:i], token[i:]) for i in range(1, len(token))]
        cuts = [(left, right) for left, right in cuts if left in ranks and right in ranks]
        cuts.sort(key=lambda cut: (ranks[cut[0]], ranks[cut[1]]))
        merges += [[written[left], written[right]] for left, right in cuts]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    regex = {"Regex": tokenizer.pattern}
    split = {"type": "Split", "pattern": regex, "behavior": "Isolated", "invert": False}
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    vocabulary = {written[token]: i for token, i in ranks.items()} | specials
    return {
        "version": "1.0", "truncation": None, "padding": None, "normalizer": None, "post_processor": None,
        "added_tokens": [{"id": i, "content": text, **special} for text, i in specials.items()],
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]}, "decoder": byte_level,
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                  "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
                  "ignore_merges": True, "vocab": vocabulary, "merges": merges},
    }

def hf_files(tokenizer, block_size):
    """{name: text} of the files that make a folder's tokenizer one for transformers.

    Padding is on the left, so that a batch of texts of different lengths is continued as each alone would be.
    """
    theirs = isinstance(tokenizer, HubTokenizer)
    eot = tokenizer.eot_text if theirs else EOT
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": eot, "eos_token": eot,
                "pad_token": eot, "padding_side": "left", "model_max_length": block_size,
                "model_input_names": ["input_ids", "attention_mask"], "clean_up_tokenization_spaces": False}
    settings |= {} if theirs else {"mask_token": MASK}
    content = tokenizer.json if theirs else json.dumps(tokenizer_json(tokenizer), ensure_ascii=False)
    return {"tokenizer.json": content, "tokenizer_config.json": json.dumps(settings, indent=2)}
