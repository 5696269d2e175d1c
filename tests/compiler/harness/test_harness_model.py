"""What the harness hears from a model is what its own backend for transformers says."""

import copy
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from planish.compiler.errors import TaskError
from planish.compiler.harness.answers import Answers
from planish.compiler.harness.generation import generate_greedily
from planish.compiler.harness.tasks import load_tasks
from planish.compiler.measure.subject import Subject, open_subject
from planish.compiler.progress import Silent
from tests.task_examples import EXAMPLES, Write
from tests.tiny import VARIANTS, write_tiny

pytest.importorskip("accelerate", reason="accelerate, which lm_eval's backend for transformers needs, is not installed")
instance = pytest.importorskip("lm_eval.api.instance", reason="lm_eval is not installed (extra 'eval')")

CONTEXTS = ["the hen ran", "the hen ran ", "an otter:\n", "x", "<|bos|>the inn", ""]


@pytest.fixture(scope="module")
def hf(tiny: Path, theirs: LlamaForCausalLM) -> Any:
    """The harness's own backend."""
    from lm_eval.models.huggingface import HFLM

    return HFLM(theirs, tokenizer=AutoTokenizer.from_pretrained(tiny), batch_size=2, device="cpu")


@pytest.fixture
def ours(subject: Subject, tmp_path: Path) -> Any:
    from planish.compiler.harness.harness_model import HarnessModel

    with Answers.hold(tmp_path / "answers", {"model": subject.fingerprint}) as answers:
        yield HarnessModel(subject, answers, Silent())


def requests(kind: str, *arguments: tuple[Any, ...]) -> list[Any]:
    return [instance.Instance(kind, {}, each, 0) for each in arguments]


def test_loglikelihoods(ours: Any, hf: Any) -> None:
    pairs = [(context, ending) for context in CONTEXTS for ending in (" in", " out of the inn", " 北")]
    # Longer than the model's context of 256 tokens: both cut from the left.
    pairs.append(("the hen ran in and out of the inn. " * 20, " in the end"))
    found = ours.loglikelihood(requests("loglikelihood", *pairs))
    expected = hf.loglikelihood(requests("loglikelihood", *pairs), disable_tqdm=True)
    np.testing.assert_allclose(found, expected, atol=3e-4)
    assert all(isinstance(greedy, bool) for _, greedy in found)


def test_whole_texts(ours: Any, hf: Any) -> None:
    texts = [("the hen",), ("the tin man's otter is in the inn. " * 40,), ("x",)]
    found = ours.loglikelihood_rolling(requests("loglikelihood_rolling", *texts))
    expected = hf.loglikelihood_rolling(requests("loglikelihood_rolling", *texts), disable_tqdm=True)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_generated_text(ours: Any, hf: Any) -> None:
    options = {"until": ["t", "\n\n"], "max_gen_toks": 12, "do_sample": False}
    asked = [(context, {**options, "until": until}) for context in CONTEXTS[:4] for until in (["t", "\n"], ["zq"])]
    asked.append(("the hen ran in and out of the inn. " * 20, options))
    found = ours.generate_until(requests("generate_until", *asked))
    # The backend writes a shorter prompt of a batch behind padding without an attention mask of its own: one by one.
    expected = [hf.generate_until(requests("generate_until", each), disable_tqdm=True)[0] for each in asked]
    assert found == expected
    assert len(set(map(len, found))) > 2


def test_a_special_token_stops_a_text(tiny: Path, theirs: LlamaForCausalLM, tmp_path: Path) -> None:
    from lm_eval.models.huggingface import HFLM

    from planish.compiler.harness.harness_model import HarnessModel

    tokenizer = AutoTokenizer.from_pretrained(tiny)
    ids, pad = tokenizer("the hen")["input_ids"], tokenizer.pad_token_id
    written = theirs.generate(torch.tensor([ids]), max_new_tokens=10, do_sample=False, eos_token_id=[])[0, len(ids) :]
    third = next(int(token) for place, token in enumerate(written) if place >= 2 and token not in written[:place])
    # A model that writes <|pad|>, which is not the end of a text, where this one writes its third new token.
    swapped = copy.deepcopy(theirs)
    with torch.no_grad():
        head = swapped.lm_head.weight
        head[[pad, third]] = head[[third, pad]].clone()
    swapped.generation_config.pad_token_id = None
    shutil.copytree(tiny, tmp_path / "model")
    swapped.save_pretrained(tmp_path / "model")
    options = {"until": ["Question:", tokenizer.pad_token], "max_gen_toks": 10, "do_sample": False}
    asked = ("the hen", options)
    hf = HFLM(swapped, tokenizer=tokenizer, batch_size=1, device="cpu")
    expected = hf.generate_until(requests("generate_until", asked), disable_tqdm=True)
    with Answers.hold(tmp_path / "answers", {}) as answers:
        ours = HarnessModel(open_subject(tmp_path / "model", threads=1), answers, Silent())
        assert ours.generate_until(requests("generate_until", asked)) == expected
    assert expected[0] != tokenizer.decode(written, skip_special_tokens=True)


def test_linear_rope_is_cut_where_the_harness_cuts(tmp_path: Path) -> None:
    from lm_eval.models.huggingface import HFLM

    from planish.compiler.harness.harness_model import HarnessModel

    model = write_tiny(tmp_path / "model", **VARIANTS["rope_linear"])
    theirs = LlamaForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    hf = HFLM(theirs, tokenizer=AutoTokenizer.from_pretrained(model), batch_size=1, device="cpu")
    pair = ("the hen ran in and out of the inn. " * 20, " in the end")
    with Answers.hold(tmp_path / "answers", {}) as answers:
        ours = HarnessModel(open_subject(model, threads=1), answers, Silent())
        found = ours.loglikelihood(requests("loglikelihood", pair))
        rolling = ours.loglikelihood_rolling(requests("loglikelihood_rolling", pair[:1]))
    np.testing.assert_allclose(found, hf.loglikelihood(requests("loglikelihood", pair), disable_tqdm=True), atol=3e-4)
    expected = hf.loglikelihood_rolling(requests("loglikelihood_rolling", pair[:1]), disable_tqdm=True)
    np.testing.assert_allclose(rolling, expected, rtol=1e-5)


def test_text_behind_nothing(ours: Any, theirs: LlamaForCausalLM) -> None:
    """A tokenizer that adds no BOS gives no token for it; the text is what transformers writes behind BOS."""
    options = {"until": ["zq"], "max_gen_toks": 12, "do_sample": False}
    found = ours.generate_until(requests("generate_until", ("", options), ("the hen", options)))
    written = theirs.generate(torch.tensor([[0]]), max_new_tokens=12, do_sample=False)[0, 1:]
    tokenizer = ours._subject.tokenizer
    assert tokenizer.encode("") == []
    assert found[0] == tokenizer.decode(written.tolist())
    assert found[1:] == ours.generate_until(requests("generate_until", ("the hen", options)))


@pytest.mark.parametrize(
    ("options", "message"),
    [({"do_sample": True, "temperature": 1.0}, "drawn at random"), ({"max_gen_toks": 256}, "leave no room")],
)
def test_text_that_is_not_written(ours: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(TaskError, match=message):
        ours.generate_until(requests("generate_until", ("the hen", options)))


def test_end_token_ends_a_text(of_bundle: Subject, tmp_path: Path) -> None:
    from dataclasses import replace

    from planish.compiler.harness.harness_model import HarnessModel

    def written(subject: Subject) -> str:
        with Answers.hold(tmp_path / str(len(subject.eos)), {}) as answers:
            options = {"until": [], "max_gen_toks": 8}
            (text,) = HarnessModel(subject, answers, Silent()).generate_until(
                requests("generate_until", ("the hen", options))
            )
            return str(text)

    tokenizer = of_bundle.tokenizer
    (tokens,) = generate_greedily(of_bundle.model, [tokenizer.encode("the hen")], 8, lambda _: False)
    assert written(of_bundle) == tokenizer.decode(tokens)
    end = tokens[1]
    expected = tokens[: tokens.index(end) + 1]
    assert written(replace(of_bundle, eos=(*of_bundle.eos, end))) == tokenizer.decode(expected)
    assert len(expected) < len(tokens)


@pytest.mark.parametrize("task", ["piqa", "hellaswag", "arc_easy", "winogrande", "boolq", "lambada_openai"])
def test_scores_example_by_example(ours: Any, hf: Any, write: Write, task: str) -> None:
    from lm_eval.evaluator import evaluate

    def samples(model: Any) -> list[dict[str, Any]]:
        tasks = load_tasks([task], write(task, *EXAMPLES[task]), Silent())
        found = evaluate(model, {"tasks": tasks}, bootstrap_iters=0)["samples"][task]
        return sorted(found, key=lambda sample: sample["doc_id"])

    for mine, other in zip(samples(ours), samples(hf), strict=True):
        assert mine["arguments"] == other["arguments"]
        np.testing.assert_allclose(mine["filtered_resps"], other["filtered_resps"], atol=3e-4)
        for metric in mine["metrics"]:
            assert mine[metric] == pytest.approx(other[metric], abs=3e-4)


def test_a_tokenizer_that_adds_bos(subject: Subject, tiny: Path, theirs: LlamaForCausalLM, tmp_path: Path) -> None:
    """Texts that begin with BOS get no second one, in the harness and here."""
    import json
    import shutil
    from dataclasses import replace

    from lm_eval.models.huggingface import HFLM

    from planish.compiler.harness.harness_model import HarnessModel
    from planish.compiler.runtime.tokenizer import Tokenizer

    folder = shutil.copytree(tiny, tmp_path / "with-bos")
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<|bos|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<|bos|>": {"id": "<|bos|>", "ids": [0], "tokens": ["<|bos|>"]}},
    }
    path.write_text(json.dumps(content), encoding="utf-8")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer("x")["input_ids"][0] == 0
    hf = HFLM(theirs, tokenizer=tokenizer, device="cpu")
    pairs = [(context, " in") for context in CONTEXTS]
    with Answers.hold(tmp_path / "answers", {}) as answers, torch.no_grad():
        ours = HarnessModel(replace(subject, tokenizer=Tokenizer(folder)), answers, Silent())
        found = ours.loglikelihood(requests("loglikelihood", *pairs))
    np.testing.assert_allclose(found, hf.loglikelihood(requests("loglikelihood", *pairs), disable_tqdm=True), atol=3e-4)
