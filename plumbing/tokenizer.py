"""Text to token ids and back: tiktoken for our own vocabularies, the library `tokenizers` for all others.

Both classes have the same few members, so that no script needs to know which it has: n_vocab, eot (the id
between documents), mask (an id that no text has, or None), token_bytes (id -> bytes, empty for special
tokens), files ({name: content}, to copy), encode_ordinary(text), encode_ordinary_batch(texts), decode(ids).
"""
import base64
import hashlib
import json
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import tiktoken
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from plumbing.files import attempt, read_json

EOT, MASK = "<|endoftext|>", "<|mask|>"
HUB_FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "config.json")
LONG_SPACE = re.compile(r"(\s{10000})")  # a million spaces overflow the stack of the regex engines: cut them

class Tokenizer:
    """A byte-pair vocabulary of ours: ranks {bytes: id}, a pattern that cuts text, special tokens."""

    def __init__(self, ranks, pattern, special_tokens):
        self.ranks, self.pattern, self.special_tokens = ranks, pattern, special_tokens
        self.tiktoken = tiktoken.Encoding("corpus", pat_str=pattern, mergeable_ranks=ranks,
                                          special_tokens=special_tokens)
        self.eot, self.mask = special_tokens[EOT], special_tokens[MASK]
        self.n_vocab = len(ranks) + len(special_tokens)
        self.token_bytes = [*sorted(ranks, key=ranks.get), *[b""] * len(special_tokens)]
        lines = [base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks.items()]
        self.files = {"tokenizer.tiktoken": b"".join(lines)}

    def encode_ordinary(self, text):
        return [i for piece in LONG_SPACE.split(text) for i in self.tiktoken.encode_ordinary(piece)]

    def encode_ordinary_batch(self, texts, threads=1):
        with ThreadPoolExecutor(threads) as pool:
            return list(pool.map(self.encode_ordinary, texts))

    def decode(self, ids):
        return self.tiktoken.decode([i for i in ids if i < self.n_vocab])  # the others only pad the model's

class HubTokenizer(Tokenizer):
    """The tokenizer.json in a folder, as Hugging Face's library reads it."""

    def __init__(self, folder):
        paths = [Path(folder, name) for name in HUB_FILES]
        self.files = {path.name: path.read_bytes() for path in paths if path.exists()}
        self.json = self.files["tokenizer.json"].decode()
        self.backend = tokenizers.Tokenizer.from_str(self.json)
        self.backend.encode_special_tokens = True  # written out in a text they are ordinary characters
        self.backend.no_padding()
        self.backend.no_truncation()
        tokens = self.backend.get_vocab()
        self.n_vocab = max(tokens.values()) + 1
        if self.n_vocab > len(self.json):  # a list of that length would take more memory than the file
            raise ValueError(f"its ids go up to {self.n_vocab - 1:,}, but it is too short for so many")
        self.token_bytes = [b""] * self.n_vocab
        for token, i in tokens.items():
            self.token_bytes[i] = bytes_of(token, '"ByteLevel"' in self.json)
        for i, token in self.backend.get_added_tokens_decoder().items():
            self.token_bytes[i] = b"" if token.special else token.content.encode()
        self.eot = id_before_text(self.files, tokens)
        no_text = (i for i, token in enumerate(self.token_bytes) if token == b"\xff")  # not a byte of UTF-8
        self.mask = tokens[MASK] if MASK in tokens else next(no_text, None)

    def encode_ordinary(self, text):
        pieces = [self.backend.encode(piece, add_special_tokens=False) for piece in LONG_SPACE.split(text)]
        return [i for piece in pieces for i in piece.ids]

    def decode(self, ids):
        return self.backend.decode([i for i in ids if i < self.n_vocab], skip_special_tokens=False)

def load_tokenizer(folder):
    """The tokenizer in a folder: a tokenizer.json, or a corpus's tokenizer.tiktoken with meta.json."""
    with attempt(f"read the tokenizer in {folder}", "prepare, copy or download it again"):
        if Path(folder, "tokenizer.json").exists():
            return HubTokenizer(folder)
        meta, content = read_json(f"{folder}/meta.json"), Path(folder, "tokenizer.tiktoken").read_bytes()
        if hashlib.sha256(content).hexdigest() != meta["sha256"]["tokenizer.tiktoken"]:
            raise ValueError("it does not match the sha256 in meta.json")
        ranks = {base64.b64decode(token): int(rank) for token, rank in map(bytes.split, content.splitlines())}
        return Tokenizer(ranks, meta["pattern"], meta["special_tokens"])

def id_before_text(files, tokens):
    """The id of the token that begins texts or, where none does, of the one that ends them."""
    for settings in (json.loads(files[name]) for name in HUB_FILES[1:] if name in files):
        for kind in ("bos_token", "eos_token", "bos_token_id", "eos_token_id"):
            token = settings.get(kind)
            token = token["content"] if isinstance(token, dict) else token
            token = token[0] if isinstance(token, list) else token
            if (i := tokens.get(token, token)) in tokens.values():  # it was named, or is the id itself
                return i
    raise ValueError("no tokenizer_config.json or config.json beside it names a bos_token or eos_token")

# GPT-2 writes each byte as one of 256 letters: LETTERS[i] stands for BYTES[i].
LETTERS = sorted(pre_tokenizers.ByteLevel.alphabet())
BYTES = sorted(range(256), key=lambda byte: (chr(byte) not in LETTERS, byte))
BYTE_OF, LETTER_OF = dict(zip(LETTERS, BYTES, strict=True)), dict(zip(BYTES, LETTERS, strict=True))

def bytes_of(token, byte_level):
    """The bytes of a token in tokenizer.json, in GPT-2's letters or with SentencePiece's ▁ and <0x0A>."""
    if byte_level and set(token) <= set(BYTE_OF):
        return bytes(BYTE_OF[letter] for letter in token)
    if re.fullmatch(r"<0x[0-9A-F]{2}>", token):
        return bytes([int(token[3:5], 16)])
    return token.replace("▁", " ").encode("utf8", "replace")

def tokenizer_json(tokenizer):
    """The text of a tokenizer.json with the ids of our Tokenizer: a byte-level byte-pair encoder.

    tiktoken joins whichever two neighbours make the token of the lowest rank, and keeps a piece whole if it
    is a token. So each way to cut a token into two tokens is a merge, in order of rank, with ignore_merges.
    """
    ranks = tokenizer.ranks
    written = {token: "".join(LETTER_OF[byte] for byte in token) for token in ranks}
    merges = []
    for token in sorted(ranks, key=ranks.get):
        cuts = [(token[:i], token[i:]) for i in range(1, len(token))]
        cuts = [(left, right) for left, right in cuts if left in ranks and right in ranks]
        cuts.sort(key=lambda cut: (ranks[cut[0]], ranks[cut[1]]))
        merges += [(written[left], written[right]) for left, right in cuts]
    vocabulary = {written[token]: i for token, i in ranks.items()} | tokenizer.special_tokens
    library = tokenizers.Tokenizer(models.BPE(vocabulary, merges, ignore_merges=True))
    library.add_special_tokens(list(tokenizer.special_tokens))
    library.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(tokenizers.Regex(tokenizer.pattern), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)])
    library.decoder = decoders.ByteLevel()
    return library.to_str()

def hf_files(tokenizer, block_size):
    """{name: text} of the files that make a folder's tokenizer one for transformers. It pads on the left, so
    that a batch of texts of different lengths is continued as each alone would be."""
    ours = not isinstance(tokenizer, HubTokenizer)
    eot = EOT if ours else tokenizer.backend.id_to_token(tokenizer.eot)
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": eot, "eos_token": eot,
                "pad_token": eot, "padding_side": "left", "model_max_length": block_size,
                "model_input_names": ["input_ids", "attention_mask"], "clean_up_tokenization_spaces": False}
    settings |= {"mask_token": MASK} if ours else {}
    return {"tokenizer.json": tokenizer_json(tokenizer) if ours else tokenizer.json,
            "tokenizer_config.json": json.dumps(settings, indent=2)}
