"A study of methods with topics: trained, stored, shown, and the topics are those of the stored weights."
import torch
from capnb.core.files import read_json
from capnb.models.load import load_captioner
from capnb.study.plan import Plan
from capnb.study.run import run_study
from capnb.tune.methods import attach


def test_study_shows_topics(tmp_path):
    plan = Plan(methods=("tcm",), seeds=1, out=str(tmp_path), train_images=12, test_images=4, steps=3, max_new_tokens=8, samples=4, settings={"tcm": {"num_topics": 3}}, metrics=("cider_d",))
    html = run_study(plan, say=lambda *a: None).read_text()
    [path] = (tmp_path / "results").glob("tcm*.json")
    result = read_json(path)
    topics = result["study"]["topics"]
    assert result["train_info"]["status"] == "success" and "Topics of TCM" in html
    assert len(topics["words"]) == 3 and all(len(t) == 8 for t in topics["words"]) and 1 <= len(topics["maps"]) <= 4
    for m in topics["maps"]:
        for part in ("prior", "posterior"):
            rows = torch.tensor(m["map"][part])
            assert rows.shape == (len(m["map"]["words"]), 4) and torch.allclose(rows.sum(1), torch.ones(len(rows)), atol=1e-3)
    base = load_captioner("tiny")
    tuned = attach(base, "tcm", num_topics=3)
    [saved] = (tmp_path / "runs").glob("tcm*/fold0/adapter")
    fresh = tuned.words(8)
    tuned.load(saved)
    assert [[w for w, _ in t] for t in tuned.words(8)] == [[w for w, _ in t] for t in topics["words"]] != [[w for w, _ in t] for t in fresh]
    tuned.detach()
