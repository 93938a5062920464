"""bench.py: its ways do the same work, its table is of medians in turn. Times themselves are not tested."""
import pytest
from conftest import ROOT, run_many

def test_the_ways_of_a_step_do_the_same_work(data_dir, tmp_path):
    """Language-model steps begin at ln V and learn. The two meta steps have one loss and differ in calls."""
    pytest.importorskip("transformers")
    source = (ROOT / "bench.py").read_text().split("if words[1:]")[0]
    check = """
import math
from plumbing.checkpoint import their_names
TINY = ModelConfig(d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, d_ff=48, vocab_size=1024, block_size=80)
SHAPES["tiny"] = (TINY, 4, (2, 16, 4, 2))
losses, calls, backward, plain = [], [], torch.Tensor.backward, Llama.features_at
torch.Tensor.backward = lambda loss: losses.append(loss.item()) or backward(loss)
Llama.features_at = lambda self, idx, at: calls.append(len(idx)) or plain(self, idx, at)
for peer in (False, True):
    step = lm_step("tiny", peer, False, torch.float32)
    for _ in range(8):
        step()
assert all(abs(losses[i] - math.log(1024)) < 0.1 and losses[i + 7] < losses[i] - 0.005 for i in (0, 8))
for again in (False, True):
    torch.manual_seed(0)
    compile_parts = lambda model: None
    meta_step("tiny", again)()
assert abs(losses[-1] - losses[-2]) < 1e-5 and calls == [16, 16, *[16] * 10, 16], (losses, calls)
ours, peer = models = [make_model("tiny", peer) for peer in (False, True)]
names = their_names(TINY.n_layers)
peer.load_state_dict({names[name]: 20 * p for name, p in ours.state_dict().items()})
ours.load_state_dict({name: 20 * p for name, p in ours.state_dict().items()})
make_model, texts = lambda name, peer: models[peer], []
for peer in (False, True):
    torch.manual_seed(0)
    texts.append(generate_step("tiny", peer)()[0].tolist())
assert texts[0] == texts[1] and len(texts[0]) == 80 and len(set(texts[0][16:])) > 5, texts
"""
    (tmp_path / "ways.py").write_text(f"import sys; sys.path.insert(0, {str(ROOT)!r})\n" + source + check)
    (done,) = run_many(tmp_path / "ways.py", [[f"--data_dir={data_dir}"]])
    assert done.returncode == 0, done.stderr

def test_a_table_of_medians_in_turn(data_dir, tmp_path):
    """The processes are stood in for: they say what their steps took."""
    source = (ROOT / "bench.py").read_text().split("if words[1:]")[0]
    check = """
seconds, turns = iter([1, 3, 20, 10, 2, 90]), []
def run(command, **_):
    turns.append(command[4])
    text = json.dumps({"seconds": [next(seconds)], "GiB": 2.0})
    return subprocess.CompletedProcess(command, 0, stdout=text, stderr="")
subprocess.run = run
rows = compare("part", "title", {"a": None, "b": None})
assert turns == list("ababab") and [row["seconds"] for row in rows] == [[1, 20, 2], [3, 10, 90]]
"""
    (tmp_path / "table.py").write_text(f"import sys; sys.path.insert(0, {str(ROOT)!r})\n" + source + check)
    (done,) = run_many(tmp_path / "table.py", [[f"--data_dir={data_dir}", "--rounds=3"]])
    assert done.returncode == 0, done.stderr
    a, b = (line.split() for line in done.stdout.splitlines()[-2:])
    assert a == "a 2000.00 ms [1000.00, 20000.00] 1.00 x the first 2.00 GiB".split()
    assert b == "b 10000.00 ms [3000.00, 90000.00] 5.00 x the first 2.00 GiB".split()

def test_mistakes_are_one_line():
    (done,) = run_many("bench.py", [["data"]])
    line = "error: cannot measure data: there are lm, meta, generate, ner, startup\n"
    assert (done.returncode, done.stderr) == (2, line)
