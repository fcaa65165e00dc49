"A study on a toy captioner: killed and resumed, asked again, on real-image folders, with hostile captions, with an adapter from elsewhere."
import dataclasses, json, warnings
from pathlib import Path
import pytest

pytest.importorskip('torch')
import torch
from PIL import Image
from capnb.core.errors import CapnbError
from capnb.data.scenes import Scenes
from capnb.models.captioner import Template
from capnb.models.llava import LlavaCaptioner, build_llava, word_tokenizer
from capnb.study import run as study_run
from capnb.study.answer import read_study
from capnb.study.plan import Plan
from capnb.study.report import write_report
from capnb.study.run import run_study
from capnb.tune.methods import METHODS
from capnb.tune.names import runnable

warnings.filterwarnings('ignore', message='meteor was not')
SMALL = dict(train_images=8, test_images=4, steps=2, batch_size=4, samples=2, max_new_tokens=6, metrics=('bleu', 'cider_d'))


def toy():
    torch.manual_seed(0)
    tokenizer = word_tokenizer('a red blue big small dog bird car on left of describe the image in one sentence . < > script b'.split())
    model, processor = build_llava(tokenizer, image_size=64, width=32, layers=2, vision_layers=1)
    return LlavaCaptioner(model, processor, Template('describe the image', ''), 'toy')


def table(folder):
    "What the table is made of: scores and captions, without times"
    return {r['study']['name']: (r['study']['domains'], r['study']['controls'], r['study']['own']) for r in read_study(folder).done}


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp('whole') / 'study'
    run_study(Plan(methods='lora,full', seeds=1, out=str(folder), **SMALL), lambda s: None, toy())
    return folder


def test_interrupted_study_ends_with_the_same_table(whole, tmp_path, monkeypatch):
    plan, evaluate, calls = Plan(methods='lora,full', seeds=1, out=str(tmp_path / 's'), **SMALL), study_run.evaluate, []

    def stop_in_second_run(*args):
        calls.append(1)
        if len(calls) == 2:  # in the middle of LoRA: trained, some captions written
            study_run.caption_file(args[0], args[0].encode(args[1].domains['target'].records[:2]), args[1].domains['target'].ids[:2],
                                   Path(args[3]) / 'target-fold0.jsonl', max_new_tokens=6)
            raise KeyboardInterrupt
        return evaluate(*args)
    base = toy()
    monkeypatch.setattr(study_run, 'evaluate', stop_in_second_run)
    with pytest.raises(KeyboardInterrupt): run_study(plan, lambda s: None, base)
    assert base.tuned_by is None and len(read_study(tmp_path / 's').done) == 1
    assert 'Not run yet: lora-seed0 and full-seed0' in write_report(tmp_path / 's').read_text()
    monkeypatch.setattr(study_run, 'evaluate', evaluate)
    run_study(plan, lambda s: None, toy())  # another process, as it were
    assert json.dumps(table(tmp_path / 's'), sort_keys=True) == json.dumps(table(whole), sort_keys=True)


def test_asked_again_nothing_is_done(whole):
    before = {p: p.stat().st_mtime_ns for p in (whole / 'results').iterdir()}
    lines = []
    run_study(Plan(methods='full,lora', seeds=1, out=str(whole), **SMALL), lines.append, toy())
    assert len(lines) == 1 and 'all of them are done' in lines[0]
    assert before == {p: p.stat().st_mtime_ns for p in (whole / 'results').iterdir()}


def test_other_settings_do_not_overwrite(whole):
    before = set((whole / 'results').iterdir())
    run_study(Plan(methods='lora', seeds=1, out=str(whole), **{**SMALL, 'steps': 1}), lambda s: None, toy())
    after = set((whole / 'results').iterdir())
    assert before < after and len(after) == len(before) + 2
    run_study(Plan(methods='full,lora', seeds=1, out=str(whole), **SMALL), lambda s: None, toy())  # the first plan is whole again
    assert len(read_study(whole).done) == 3


def test_report_is_one_file_without_network(whole):
    html = (whole / 'index.html').read_text()
    assert not any(x in html for x in ('src="http', 'href="http', 'url(http', '@import', '<script'))
    assert html.count('data:image/') >= 5 and 'shuffled images' in html and 'best constant caption' in html


def test_hostile_captions_are_escaped(tmp_path):
    (tmp_path / 'd').mkdir()
    evil = '<script>alert(1)</script> "a" & \'b\' \u2028 dog'
    for i in range(6):
        Image.new('RGB', (40 + i, 30), (40 * i, 90, 200)).save(tmp_path / 'd' / f'{i}.png')
        (tmp_path / 'd' / f'{i}.txt').write_text(evil + f' {i}\n', encoding='utf-8')
    plan = Plan(data=f"folder:{tmp_path / 'd'}", methods='zero_shot', out=str(tmp_path / 'out: 1'), folds=2, **SMALL)
    html = run_study(plan, lambda s: None, toy()).read_text()
    assert '<script' not in html and '&lt;script&gt;' in html


def test_real_images_run_in_folds(tmp_path):
    (tmp_path / 'my images').mkdir()
    rows = []
    for i in range(10):
        Image.new('RGB', (50, 50), (25 * i, 255 - 25 * i, 99)).save(tmp_path / 'my images' / f'{i}.jpg')
        rows.append(json.dumps({'file_name': f'{i}.jpg', 'captions': [f'a red dog {i}', f'a blue bird {i}']}))
    (tmp_path / 'my images' / 'captions.jsonl').write_text('\n'.join(rows))
    plan = Plan(data=f"folder:{tmp_path / 'my images'}", methods='lora', seeds=1, out=str(tmp_path / 'out'), folds=5, **SMALL)
    run_study(plan, lambda s: None, toy())
    study = read_study(tmp_path / 'out')
    assert study.plan['data']['folds'] == 5 and study.plan['data']['domains'] == dict(target=10, source=4, near=4, out=4)
    assert all(len(r['study']['domains']['target']['captions']) == 10 and r['study']['controls']['shuffled'] for r in study.done)


@pytest.fixture(scope='module')
def llava15(tmp_path_factory):
    "LLaVA-1.5 as transformers defines it, small and random, saved by transformers' own means"
    from transformers import (CLIPImageProcessor, CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor)
    torch.manual_seed(1)
    tokenizer, folder = toy().tokenizer, tmp_path_factory.mktemp('hub') / 'llava-1.5-tiny'
    vision = CLIPVisionConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2, image_size=42, patch_size=14, projection_dim=32)
    text = LlamaConfig(vocab_size=len(tokenizer), hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4,
                       pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id)
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=tokenizer.convert_tokens_to_ids('<image>'))
    assert config.vision_feature_layer == -2 and config.vision_feature_select_strategy == 'default'  # as LLaVA-1.5 has it
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    pixels = CLIPImageProcessor(size={'shortest_edge': 42}, crop_size={'height': 42, 'width': 42})
    LlavaProcessor(pixels, tokenizer, patch_size=14, vision_feature_select_strategy='default', num_additional_image_tokens=1).save_pretrained(folder)
    return folder


def test_llava15_from_disk_goes_through_the_whole_study(llava15, tmp_path):
    plan = Plan(base=str(llava15), methods='all', seeds=1, out=str(tmp_path / 's'), **SMALL)
    html = run_study(plan, lambda s: None).read_text()
    study = read_study(tmp_path / 's')
    assert {r['study']['name'].split('-')[0] for r in study.done} == set(runnable(METHODS.names())), study.failed
    for r in study.done:
        assert len(r['study']['domains']['target']['captions']) == 4 and 'source' in r['study']['domains'], r['study']['name']
    assert all(name in html for name in ('llava-1.5-tiny', 'LoRA', 'full fine-tuning', 'prompt learning'))


def test_adapter_from_elsewhere_is_only_evaluated(tmp_path, whole):
    adapter = next((whole / 'runs').glob('lora-seed0-*')) / 'fold0' / 'adapter'
    plan = Plan(methods='zero_shot', adapters=(str(adapter),), out=str(tmp_path / 's'), **SMALL)
    lines = []
    run_study(plan, lines.append, toy())
    study = read_study(tmp_path / 's')
    assert not study.failed, study.failed[0]['run_info']['error_msg']
    assert study.methods == ['zero_shot', 'adapter:adapter']
    mine, theirs = study.of('adapter:adapter')[0], None
    for r in (json.loads(p.read_text()) for p in (whole / 'results').iterdir()):
        if r['study']['name'] == 'lora-seed0' and r['study']['fingerprint'] == adapter.parts[-3].split('-')[-1]: theirs = r
    assert mine['study']['domains']['target']['captions'] == theirs['study']['domains']['target']['captions']


def test_wrong_settings_are_said_before_anything_runs(tmp_path):
    for wrong in (dict(methods='lorra'), dict(data='scnes'), dict(data='folder:/no/such/folder')):
        with pytest.raises(CapnbError): run_study(Plan(**{**dict(out=str(tmp_path / 'x'), **SMALL), **wrong}), lambda s: None, toy())
    assert not (tmp_path / 'x' / 'results').exists()


def photos(folder, shift):
    "Ten pictures with the same names in every folder, but other colours"
    folder.mkdir()
    for i in range(10):
        Image.effect_noise((40, 40), 20 + 20*i + shift).convert('RGB').save(folder / f'{i}.png')
        (folder / f'{i}.txt').write_text(f'a red dog {i}\na blue bird\n')
    return folder


def test_one_captioner_in_two_studies(tmp_path):
    "Features are kept under the ids of one study: another with the same ids must not get them, and the base comes back as it was"
    kw = dict(methods='zero_shot', folds=2, **SMALL)
    a, b, shared = photos(tmp_path / 'a', 0), photos(tmp_path / 'b', 90), toy()
    with torch.no_grad():
        for p in shared.parameters(): p.mul_(3.)  # so that captions differ from picture to picture
    fresh = toy(); fresh.load_state_dict(shared.state_dict())
    before = shared.template_, shared.cache
    run_study(Plan(data=f'folder:{a}', out=str(tmp_path / 'x'), prompt='describe', **kw), lambda s: None, shared)
    assert (shared.template_, shared.cache) == before and shared.tuned_by is None
    run_study(Plan(data=f'folder:{b}', out=str(tmp_path / 'y'), **kw), lambda s: None, shared)
    run_study(Plan(data=f'folder:{b}', out=str(tmp_path / 'z'), **kw), lambda s: None, fresh)
    own = [read_study(tmp_path / d).done[0]['study']['own']['log_prob'] for d in 'yz']
    assert table(tmp_path / 'y') == table(tmp_path / 'z') and own[0] == own[1]


def test_changed_data_are_noticed(tmp_path):
    "Asked again after a caption or a picture was corrected, the study is not 'done'"
    data, kw = photos(tmp_path / 'd', 0), dict(methods='zero_shot', folds=2, **SMALL)
    plan = Plan(data=f"folder:{data}", out=str(tmp_path / 'out'), **kw)
    def left():
        lines = []
        run_study(plan, lines.append, toy())
        return 'all of them are done' not in lines[0]
    assert left() and not left()
    (data / '9.txt').write_text('a small dog on a bird\n'); assert left() and not left()
    Image.new('RGB', (40, 40), 'red').save(data / '3.png'); assert left() and not left()


def test_retrained_adapter_is_evaluated_again(tmp_path):
    from capnb.tune.methods import attach
    data, lines = photos(tmp_path / 'd', 0), []
    for seed in (0, 1):
        torch.manual_seed(seed); t = attach(toy(), 'lora')
        with torch.no_grad():
            for p in t.parameters(): p.normal_()
        t.save(tmp_path / 'adapter')
        run_study(Plan(data=f'folder:{data}', methods='zero_shot', adapters=(str(tmp_path / 'adapter'),), folds=2, out=str(tmp_path / 'out'), **SMALL), lines.append, toy())
    first = [l for l in lines if 'still to do' in l or 'are done' in l]
    assert '2 still to do' in first[0] and '1 still to do' in first[1]


def test_one_bad_adapter_does_not_touch_the_others(tmp_path):
    from capnb.tune.methods import attach
    data = photos(tmp_path / 'd', 0)
    for name in ('bad', 'good'):
        t = attach(toy(), 'lora'); t.save(tmp_path / name)
    torn = tmp_path / 'bad' / 'adapter_model.safetensors'
    torn.write_bytes(torn.read_bytes()[:100])
    base = toy()
    run_study(Plan(data=f'folder:{data}', methods='zero_shot', adapters=(str(tmp_path / 'bad'), str(tmp_path / 'good')), folds=2, out=str(tmp_path / 'out'), **SMALL), lambda s: None, base)
    study = read_study(tmp_path / 'out')
    assert [r['study']['name'] for r in study.failed] == ['adapter-bad'] and 'adapter-good' in [r['study']['name'] for r in study.done]
    assert base.tuned_by is None and next(r for r in study.done if r['study']['name'] == 'adapter-good')['train_info']['file_size'] > 0
