"""The readers of published formats: fixtures written here, on paths with blanks and colons, and every way in which such files break."""
import json, os, re, subprocess, sys, zlib
from pathlib import Path
import pytest
from PIL import Image
from capnb.core.errors import CapnbError, ConfigError, DataError
from capnb.data.load import READERS, load_data
from capnb.study import cli

ODD = 'my: data, näme @home'  # a folder that people have


def picture(path, i=0, kind=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new('RGB', (12, 8), (40*i, 0, 0)).save(path, kind)


def red(record): return round(record.load_image().getpixel((0, 0))[0]/40)


class Fixture:
    "A good set in one format, in a folder with an odd name; `write(change)` writes it again, changed"
    def __init__(self, root):
        self.root, self.images = root/ODD, root/ODD/'pictures: all'
        self.images.mkdir(parents=True)
        self.make()
        self.write()

    def write(self, change=lambda x: None):
        content = self.content()
        content = content if (new := change(content)) is None else new
        data = content if isinstance(content, bytes) else self.encode(content)
        self.file.write_bytes(data)
        return self

    def encode(self, content): return json.dumps(content).encode()
    @property
    def spec(self): return f'{self.reader}:{self.file}:{self.images}'
    def load(self, **kw): return load_data(self.spec, **kw)


class Karpathy(Fixture):
    reader = 'karpathy'
    splits = ['train', 'restval', 'val', 'test']
    expected = {100+i: [f'A tile, {i}.', f'Number {i}'] for i in range(4)}

    def make(self):
        self.file = self.root/'dataset coco: 1.json'
        for i in range(4): picture(self.images/f'val2014/COCO_val2014_{100+i:012}.jpg', i)

    def content(self):
        return {'images': [{'filepath': 'val2014', 'sentids': [2*i, 2*i+1], 'filename': f'COCO_val2014_{100+i:012}.jpg', 'imgid': i, 'split': s, 'cocoid': 100+i,
            'sentences': [{'tokens': c.lower().split(), 'raw': c, 'imgid': i, 'sentid': 2*i+j} for j, c in enumerate(self.expected[100+i])]} for i, s in enumerate(self.splits)], 'dataset': 'coco'}

    entries = staticmethod(lambda d: d['images'])
    broken = {
        'image missing': (lambda d: d['images'][2].update(filename='x.jpg', cocoid=7), ['images[2]', 'id 7', 'x.jpg', 'not in the folder'], 'missing image', 3),
        'no file name': (lambda d: (d['images'][2].pop('filename'), d['images'][2].update(cocoid=9)) and None, ['images[2]', '000000000009.jpg'], 'missing image', 3),
        'leads out': (lambda d: d['images'][2].update(filename='../../etc', filepath='..', cocoid=9), ['images[2]', 'leads out'], 'bad image name', 3),
        'unknown split': (lambda d: d['images'][2].update(split='dev2'), ['images[2]', 'dev2', 'restval'], 'unknown split', 3),
        'split a list': (lambda d: d['images'][2].update(split=['val']), ['images[2]'], 'unknown split', 3),
        'id twice': (lambda d: d['images'][2].update(cocoid=101), ['images[2]', 'id 101', 'before'], 'duplicate id', 3),
        'id a list': (lambda d: d['images'][2].update(cocoid=[1]), ['images[2]', 'neither text'], 'bad id', 3),
        'sentence id twice': (lambda d: d['images'][2]['sentences'][1].update(sentid=0), ['annotation id 0'], 'duplicate id', 4),
        'sentences a text': (lambda d: d['images'][2].update(sentences='A tile'), ['images[2]', 'not a list'], 'wrong shape', 3),
        'no sentences': (lambda d: d['images'][2].update(sentences=[]), ['image 102', 'no caption'], 'image without a caption', 3),
        'a sentence without text': (lambda d: d['images'][2]['sentences'][1].update(raw=None, tokens=None), ['images[2]', 'null'], 'caption is not text', 4),
        'an empty sentence': (lambda d: d['images'][2]['sentences'][1].update(raw=' '), ['images[2]', 'empty'], 'empty caption', 4),
        'an image that is a number': (lambda d: d['images'].append(3), ['images[4]', 'int'], 'wrong shape', 4)}
    wrong = {
        'COCO': (lambda d: {'images': [{'id': 1, 'file_name': 'x'}], 'annotations': []}, ['coco:']), 'results': (lambda d: [{'image_id': 1, 'caption': 'x'}], ['results file']),
        'images an object': (lambda d: {'images': {}}, ['not a list but dict']), 'another': (lambda d: {'data': []}, ["'data'"])}


class Nocaps(Fixture):
    reader = 'nocaps'
    expected = {i: [f'Tile {i}, said {j}.' for j in range(10)] for i in range(3)}

    def make(self):
        self.file = self.root/'nocaps val.json'
        for i in range(3): picture(self.images/f'{i}b0.jpg', i)

    def content(self):
        return {'licenses': [], 'info': {'version': '0.1'}, 'images': [{'id': i, 'open_images_id': f'{i}b0', 'file_name': f'{i}b0.jpg', 'coco_url': 'http://x', 'license': 0, 'domain': d}
            for i, d in enumerate(('in-domain', 'near-domain', 'out-domain'))], 'annotations': [{'id': 10*i+j, 'image_id': i, 'caption': c} for i, cs in self.expected.items() for j, c in enumerate(cs)]}

    entries = staticmethod(lambda d: d['annotations'])
    broken = {
        'image missing': (lambda d: d['images'][1].update(file_name='x.jpg'), ['images[1]', 'id 1', 'x.jpg'], 'missing image', 2),
        'no domain': (lambda d: d['images'][1].pop('domain') and None, ['images[1]', 'no domain', 'near-domain'], 'unknown domain', 2),
        'another domain': (lambda d: d['images'][1].update(domain='near'), ['images[1]', "'near'"], 'unknown domain', 2),
        'domain a number': (lambda d: d['images'][1].update(domain=1), ['images[1]'], 'unknown domain', 2),
        'caption empty': (lambda d: d['annotations'][4].update(caption=''), ['annotations[4]', 'empty'], 'empty caption', 3),
        'caption a number': (lambda d: d['annotations'][4].update(caption=4), ['annotations[4]', 'int'], 'caption is not text', 3),
        'caption for nobody': (lambda d: d['annotations'][4].update(image_id=9), ['annotations[4]', '9'], 'caption for an unknown image', 3),
        'image twice': (lambda d: d['images'].append(d['images'][1]), ['images[3]', 'before'], 'duplicate id', 3)}
    wrong = {'image info': (lambda d: {'images': d['images']}, ['without captions', 'not public']), 'instances': (lambda d: {'images': [], 'annotations': [{'bbox': [], 'image_id': 1}]}, ['instances'])}


class TextCaps(Fixture):
    reader = 'textcaps'
    expected = {f'a{i}': [f'It says {i}.', f'The sign has a {i}'] for i in range(3)}

    def make(self):
        self.file = self.root/'TextCaps val.json'
        for i in range(3): picture(self.images/f'train_images/a{i}.jpg', i)

    def content(self):
        return {'dataset_type': 'val', 'dataset_name': 'textcaps', 'dataset_version': '0.1', 'data': [{'image_id': k, 'image_classes': ['Sign'], 'flickr_original_url': 'http://x', 'image_width': 12,
            'image_height': 8, 'set_name': 'val', 'image_name': k, 'image_path': f'train/{k}.jpg', 'caption_id': 10*i+j, 'caption_str': c, 'reference_strs': cs, 'reference_tokens': [c.split() for c in cs]}
            for i, (k, cs) in enumerate(self.expected.items()) for j, c in enumerate(cs)]}

    entries = staticmethod(lambda d: d['data'])
    broken = {
        'image missing': (lambda d: [e.update(image_id='z', image_name='z', image_path='train/z.jpg') for e in d['data'][2:3]] and None, ['data[2]', "'z'"], 'missing image', 3),
        'caption null': (lambda d: d['data'][2].update(caption_str=None), ['data[2]', 'null'], 'caption is not text', 3),
        'caption empty': (lambda d: d['data'][2].update(caption_str='\t'), ['data[2]', 'empty'], 'empty caption', 3),
        'caption an object': (lambda d: d['data'][2].update(caption_str={'a': 1}), ['data[2]', 'dict'], 'caption is not text', 3),
        'caption id twice': (lambda d: d['data'][2].update(caption_id=0), ['annotation id 0'], 'duplicate id', 3),
        'id missing': (lambda d: d['data'][2].pop('image_id') and None, ['data[2]', 'None'], 'bad id', 3),
        'set a number': (lambda d: d['data'][2].update(set_name=1), ['data[2]', 'set_name'], 'unknown split', 3),
        'an entry that is a list': (lambda d: d['data'].append([]), ['data[6]', 'list'], 'wrong shape', 3)}
    wrong = {'test set': (lambda d: {'data': [{'image_id': 'a0', 'set_name': 'test'}]}, ['not public']), 'TextVQA': (lambda d: {'data': [{'image_id': 'a0', 'question': 'What?'}]}, ['TextVQA']),
        'results': (lambda d: [{'image_id': 1, 'caption': 'x'}], ['results file'])}


class VizWiz(Fixture):
    reader = 'vizwiz'
    expected = {i: [f'A shelf with {i}.', f'{i} tins'] for i in range(3)}

    def make(self):
        self.file = self.root/'val: viz.json'
        for i in range(4): picture(self.images/f'VizWiz_val_{i:08}.jpg', i)

    def content(self):
        notes = [{'image_id': i, 'caption': c, 'is_precanned': False, 'is_rejected': False, 'text_detected': True} for i, cs in self.expected.items() for c in cs]
        notes += [{'image_id': i, 'caption': 'No idea.', 'is_precanned': i % 2 == 1, 'is_rejected': i % 2 == 0, 'text_detected': False} for i in range(4)]
        return {'info': {}, 'images': [{'id': i, 'file_name': f'VizWiz_val_{i:08}.jpg', 'vizwiz_url': 'http://x', 'text_detected': True} for i in range(4)], 'annotations': [n | {'id': j} for j, n in enumerate(notes)]}

    entries = staticmethod(lambda d: d['annotations'])
    left_out = 5  # two rejected, two precanned, one image with nothing else
    broken = {
        'image missing': (lambda d: d['images'][1].update(file_name='x.jpg'), ['images[1]', 'x.jpg'], 'missing image', 2),
        'flag a text': (lambda d: d['annotations'][2].update(is_rejected='true'), ['annotations[2]', "'true'", 'is_rejected'], 'wrong shape', 3),
        'flag null': (lambda d: d['annotations'][2].update(is_precanned=None), ['annotations[2]', 'is_precanned'], 'wrong shape', 3),
        'caption empty': (lambda d: d['annotations'][2].update(caption=''), ['annotations[2]', 'empty'], 'empty caption', 3),
        'an image that nobody described': (lambda d: d['images'].append({'id': 9, 'file_name': 'VizWiz_val_00000000.jpg'}), ['image 9', 'no caption'], 'image without a caption', 3)}
    wrong = {'test set': (lambda d: {'images': d['images']}, ['not public'])}


class Flickr(Fixture):
    reader = 'flickr'
    expected = {f'{i}_ab.jpg': [f'A dog , {i} .', f'Number {i}'] for i in range(3)}

    def make(self):
        self.file = self.root/'Flickr8k: token.txt'
        for i in range(3): picture(self.images/f'{i}_ab.jpg', i)

    def content(self): return [f'{k}#{j}\t{c}' for k, cs in self.expected.items() for j, c in enumerate(cs)]
    def encode(self, content): return ('\n'.join(content) + '\n').encode()

    broken = {
        'image missing': (lambda d: d.__setitem__(2, 'x.jpg#0\tA dog'), ['line 3', 'x.jpg'], 'missing image', 3),
        'no tab': (lambda d: d.__setitem__(2, '1_ab.jpg#0 A dog'), ['line 3', 'tab'], 'wrong shape', 3),
        'no number': (lambda d: d.__setitem__(2, '1_ab.jpg\tA dog'), ['line 3', '#0'], 'wrong shape', 3),
        'the number twice': (lambda d: d.__setitem__(2, '1_ab.jpg#1\tA dog'), ['line 4', '1_ab.jpg#1', 'before'], 'duplicate id', 3),
        'caption empty': (lambda d: d.__setitem__(2, '1_ab.jpg#0\t '), ['line 3', 'empty'], 'empty caption', 3),
        'leads out': (lambda d: d.__setitem__(2, '../x.jpg#0\tA dog'), ['line 3', 'leads out'], 'bad image name', 3)}
    wrong = {'empty': (lambda d: b'', ['no usable record'])}


class Conceptual(Fixture):
    reader = 'conceptual'
    links = ['http://example.org/a/one.jpg', 'https://example.org/b/two%20x.jpg?w=3', 'own/three.png']

    def make(self):
        self.file = self.root/'Train GCC: training.tsv'
        picture(self.images/str(zlib.crc32(self.links[0].encode())), 0, 'PNG'); picture(self.images/'two x.jpg', 1); picture(self.images/'own/three.png', 2)
        self.expected = {str(zlib.crc32(self.links[0].encode())): ['alt of 0'], 'two x.jpg': ['alt of 1'], 'own/three.png': ['alt of 2']}

    def content(self): return [f'alt of {i}\t{link}' for i, link in enumerate(self.links)]
    def encode(self, content): return ('\n'.join(content) + '\n').encode()

    broken = {
        'image missing': (lambda d: d.append('x\thttp://example.org/gone.jpg'), ['line 4', 'gone.jpg', 'links of this set die'], 'missing image', 3),
        'one column': (lambda d: d.append('only a caption'), ['line 4', 'one field'], 'wrong shape', 3),
        'a tab in the caption': (lambda d: d.append('half\tother half\thttp://example.org/a/one.jpg'), ['line 4', '3 fields', 'tab'], 'wrong shape', 3),
        'caption empty': (lambda d: d.append('\thttp://example.org/a/one.jpg'), ['line 4', 'empty'], 'empty caption', 3),
        'no link': (lambda d: d.append('x\t '), ['line 4', 'no link'], 'no image name', 3),
        'a name of two links': (lambda d: d.append('x\thttp://other.org/two%20x.jpg'), ['two x.jpg', '2 links'], 'two links, one file', 2),
        'leads out': (lambda d: d.append('x\t../x.png'), ['line 4', 'leads out'], 'bad image name', 3)}
    wrong = {'empty': (lambda d: b'', ['no usable record'])}


ALL = [Karpathy, Nocaps, TextCaps, VizWiz, Flickr, Conceptual]
JSON = ALL[:4]
every = pytest.mark.parametrize('kind', ALL, ids=lambda k: k.reader)


@every
def test_what_was_written_comes_back(kind, tmp_path):
    data = (f := kind(tmp_path)).load()
    assert data.references() == f.expected and [red(r) for r in data] == list(range(len(data)))
    assert data.skipped.total() == getattr(f, 'left_out', 0) and len(f.load(on_error='skip')) == len(data)
    assert kind.reader in READERS and load_data(f' {kind.reader} : {f.file} : {f.images} ').ids == data.ids


@every
def test_a_byte_order_mark_and_windows_line_ends(kind, tmp_path):
    f = kind(tmp_path)
    text = f.file.read_bytes() if kind not in JSON else json.dumps(f.content(), indent=1).encode()
    f.file.write_bytes(b'\xef\xbb\xbf' + text.replace(b'\n', b'\r\n'))
    assert f.load().references() == f.expected


BROKEN = [(k, name) for k in ALL for name in k.broken]
@pytest.mark.parametrize('kind,name', BROKEN, ids=[f'{k.reader}, {n}' for k, n in BROKEN])
def test_a_fault_is_named_or_counted(kind, name, tmp_path):
    change, words, reason, left = kind.broken[name]
    f = kind(tmp_path).write(change)
    with pytest.raises(DataError) as e: f.load()
    for word in [f.file.name, *words]: assert word in str(e.value), f'{word!r} not in: {e.value}'
    assert 'Try: ' in str(e.value)
    data = f.load(on_error='skip')
    known = 1 + (name == 'a name of two links')
    assert data.skipped[reason] == known and f.file.name in data.skipped.places[reason][0], data.skipped
    assert len(data) == left and all(r.captions and r.load_image() for r in data)


WRONG = [(k, name) for k in ALL for name in k.wrong]
@pytest.mark.parametrize('kind,name', WRONG, ids=[f'{k.reader}, {n}' for k, n in WRONG])
def test_another_file_is_recognized(kind, name, tmp_path):
    change, words = kind.wrong[name]
    f = kind(tmp_path).write(change)
    for on_error in ('raise', 'skip'):
        with pytest.raises(DataError) as e: f.load(on_error=on_error)
        for word in [f.file.name, *words]: assert word in str(e.value), f'{word!r} not in: {e.value}'


@every
def test_files_that_are_no_text(kind, tmp_path):
    f = kind(tmp_path)
    good = f.file.read_bytes()
    for data, word in ((good.decode().encode('utf-16'), 'UTF-16'), (b'\x1f\x8b\x08\0' + good, 'gzip'), (b'PK\x03\x04' + good, 'zip')):
        f.file.write_bytes(data)
        with pytest.raises(DataError, match=word): f.load()
    f.file.write_bytes(good.replace(b'tile', b'caf\xe9').replace(b'Tile', b'caf\xe9').replace(b'dog', b'caf\xe9').replace(b'alt', b'caf\xe9').replace(b'sign', b'caf\xe9').replace(b'shelf', b'caf\xe9'))
    with pytest.raises(DataError, match='UTF-8'): f.load()
    f.file.unlink()
    with pytest.raises(DataError, match='no such file'): f.load()
    f.write()
    with pytest.raises(DataError, match='no such images folder'): load_data(f'{f.reader}:{f.file}:{f.root}/none')
    with pytest.raises(ConfigError, match='needs'): load_data(f'{f.reader}:{f.file.name.replace(":", "")}')
    with pytest.raises((DataError, ConfigError)): load_data(f'{f.reader}:')


@pytest.mark.parametrize('kind', JSON, ids=lambda k: k.reader)
def test_a_truncated_file(kind, tmp_path):
    f = kind(tmp_path)
    good = f.file.read_bytes()
    last = f.entries(f.content())[-1]
    f.file.write_bytes(good[:good.rindex(json.dumps(last).encode()) + 5])  # in the last entry
    with pytest.raises(DataError, match='cut off.*get the file again'): f.load()
    data = f.load(on_error='skip')
    assert data.skipped['broken JSON'] == 1 and len(data) >= len(f.expected) - 1
    for cut in range(1, len(good) - 1, max(len(good)//9, 1)):
        f.file.write_bytes(good[:cut])
        with pytest.raises(DataError): f.load()
        try: f.load(on_error='skip')
        except DataError as e: assert f.file.name in str(e)


@every
def test_all_images_missing(kind, tmp_path):
    f = kind(tmp_path)
    (tmp_path/'nothing').mkdir()
    with pytest.raises(DataError, match='not in the folder'): load_data(f'{f.reader}:{f.file}:{tmp_path}/nothing')
    with pytest.raises(DataError, match=r'no usable record.*missing image'): load_data(f'{f.reader}:{f.file}:{tmp_path}/nothing', on_error='skip')


@every
def test_broken_pictures(kind, tmp_path):
    f = kind(tmp_path)
    next(p for p in sorted(f.images.rglob('*')) if p.is_file()).write_bytes(b'no picture')
    with pytest.raises(DataError, match='not an image'): f.load(check_images=True)
    assert f.load(on_error='skip').skipped['undecodable image'] == 1


@pytest.mark.parametrize('kind', [Karpathy, TextCaps, Flickr], ids=lambda k: k.reader)
def test_one_id_twice_is_one_image_or_an_error(kind, tmp_path):
    f = kind(tmp_path)
    assert len(f.load().ids) == len(set(map(str, f.load().ids)))


# --- splits and domains
def test_karpathy_splits(tmp_path):
    f = Karpathy(tmp_path)
    data = f.load()
    assert data.splits == {'train': 1, 'restval': 1, 'val': 1, 'test': 1}
    assert data.part('train').ids == [100, 101] and load_data(f.spec + '@train').ids == [100, 101]
    assert load_data(f.spec + '@restval').ids == [101] and load_data(f.spec + '@val').ids == [102] and f.load(split='test').ids == [103]
    with pytest.raises(ConfigError, match='did you mean test'): load_data(f.spec + '@tset')


def test_another_split_needs_no_images(tmp_path):
    f = Karpathy(tmp_path)
    for i in (0, 1, 3): (f.images/f'val2014/COCO_val2014_{100+i:012}.jpg').unlink()
    assert load_data(f.spec + '@val').ids == [102]
    with pytest.raises(DataError, match='id 100'): f.load()


def test_karpathy_of_flickr_and_of_coco_2017(tmp_path):
    f = Karpathy(tmp_path)
    for i in range(4): (f.images/f'val2014/COCO_val2014_{100+i:012}.jpg').rename(f.images/f'{100+i:012}.jpg')
    assert [red(r) for r in f.load()] == [0, 1, 2, 3]
    def flickr(d):
        d['dataset'] = 'flickr30k'
        for e in d['images']:
            for k in ('filepath', 'cocoid'): e.pop(k)
            e['filename'] = f"{100 + e['imgid']:012}.jpg"
            for s in e['sentences']: s.pop('raw')
    data = f.write(flickr).load()
    assert data.ids == [0, 1, 2, 3] and data.captions(1) == ['a tile, 1.', 'number 1']


def test_a_study_takes_the_splits(tmp_path):
    from capnb.study.plan import Plan
    from capnb.study.sets import study_sets
    def many(d):
        one = d['images'][0]
        d['images'] = [one | {'cocoid': 1000+i, 'imgid': i, 'split': s, 'sentences': [{'raw': f'{s} {i}', 'sentid': i}]} for i, s in enumerate(['train']*5 + ['restval']*3 + ['val']*4 + ['test']*4)]
    f = Karpathy(tmp_path).write(many)
    sets = study_sets(Plan(data=f.spec, train_images=6, test_images=3))
    assert len(sets.train) == 1 and len(sets.train[0]) == 6 and {c[0].split()[0] for c in sets.train[0].references().values()} <= {'train', 'restval'}
    assert len(sets.domains['target'].records) == 3 and all(r.split == 'test' for r in sets.domains['target'].records)


def test_nocaps_domains(tmp_path):
    f = Nocaps(tmp_path)
    assert f.load().domains == {'in': 1, 'near': 1, 'out': 1} and [r.domain for r in f.load()] == ['in', 'near', 'out']
    assert load_data(f.spec + '@out').ids == [2] and f.load().domain('near').ids == [1]
    (f.images/'0b0.jpg').unlink()
    assert load_data(f.spec + '@near').references() == {1: f.expected[1]}
    with pytest.raises(ConfigError, match='did you mean near'): load_data(f.spec + '@naer')


def test_vizwiz_leaves_out_what_nobody_should_learn(tmp_path):
    f = VizWiz(tmp_path)
    data = f.load()
    assert data.skipped == {'rejected annotation': 2, 'precanned annotation': 2, 'image without a caption that is left': 1} and data.splits == {'val': 3}
    assert not any('No idea.' in r.captions for r in data)
    no_flags = f.write(lambda d: [a.pop(k) for a in d['annotations'] for k in ('is_rejected', 'is_precanned')] and None).load()
    assert len(no_flags) == 4 and no_flags.skipped.total() == 0


def test_flickr_lists(tmp_path):
    f = Flickr(tmp_path)
    for name, images in (('train', '0_ab.jpg\r\n'), ('dev', '\ufeff1_ab\n'), ('test', '2_ab.jpg')): (f.root/f'Flickr_8k.{name}Images.txt').write_text(images, newline='')
    assert f.load().splits == {'train': 1, 'dev': 1, 'test': 1} and load_data(f.spec + '@val').ids == ['1_ab.jpg']
    assert load_data(f'{f.spec}:{f.root}/Flickr_8k.testImages.txt').ids == ['2_ab.jpg'] and load_data(f'{f.spec}:{f.root}').splits == f.load().splits
    (f.root/'test.txt').write_text('0_ab.jpg\n7_ab.jpg')
    with pytest.raises(DataError, match='7_ab'): load_data(f'{f.spec}:{f.root}/test.txt')
    assert load_data(f'{f.spec}:{f.root}/test.txt', on_error='skip').ids == ['0_ab.jpg']
    with pytest.raises(DataError, match='list of'): load_data(f'{f.spec}:{f.root}')
    assert f.write(lambda d: d.append('2258277193_586949ec62.jpg.1#0\tA dog')).load().skipped == {'image that the set never held': 1}


def test_tabs_and_quotes_stay_text(tmp_path):
    f = Flickr(tmp_path).write(lambda d: d.__setitem__(0, '0_ab.jpg#0\tA "dog\tand" a cat\tbark'))
    assert f.load().captions(0)[0] == 'A "dog and" a cat bark'
    c = Conceptual(tmp_path/'c').write(lambda d: d.__setitem__(0, '"quoted, " one\t' + d[0].split('\t')[1] + '\tdog,cat\t/m/1,/m/2\t.9,.8'))
    assert c.load().captions(0) == ['"quoted, " one']


def test_conceptual_with_a_header(tmp_path):
    f = Conceptual(tmp_path).write(lambda d: ['url\tcaption', *('\t'.join(r.split('\t')[::-1]) for r in d)])
    assert f.load().references() == f.expected and f.load().splits == {'train': 3}
    f.write(lambda d: ['filepath\ttitle\tother', 'own/three.png\tmine\tx', 'own/three.png\talso mine\ty'])
    assert f.load().references() == {'own/three.png': ['mine', 'also mine']}


def test_a_path_that_ends_like_a_split(tmp_path):
    f = Karpathy(tmp_path)
    f.images.rename(f.root/'pictures@val'); f.images = f.root/'pictures@val'
    assert len(f.load()) == 4 and load_data(f.spec + '@val').ids == [102]


# --- tables of the datasets package
@pytest.fixture
def datasets(monkeypatch):
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    module = pytest.importorskip('datasets', reason='the datasets package is not installed')
    module.disable_progress_bars()
    return module


def rows(tmp_path, n=3):
    for i in range(n): picture(tmp_path/f'p{i}.png', i)
    return [{'image': str(tmp_path/f'p{i}.png'), 'caption': [f'A tile {i}.', f'{i}'], 'img_id': f'id{i}'} for i in range(n)]


def test_hub_tables(datasets, tmp_path):
    kind = datasets.Features({'image': datasets.Image(), 'caption': [datasets.Value('string')], 'img_id': datasets.Value('string')})
    part = lambda r: datasets.Dataset.from_list(r, features=kind)
    r, odd = rows(tmp_path), tmp_path/ODD
    datasets.DatasetDict(train=part(r[:2]), validation=part(r[2:])).save_to_disk(odd/'saved: here')
    expected = {f'id{i}': [f'A tile {i}.', f'{i}'] for i in range(3)}
    data = load_data(f'datasets:{odd}/saved: here')
    assert data.references() == expected and data.splits == {'train': 2, 'validation': 1} and [red(x) for x in data] == [0, 1, 2]
    assert load_data(f'datasets:{odd}/saved: here@val').ids == ['id2'] and len(load_data(f'datasets:{odd}/saved: here', on_error='skip')) == 3
    part(r).save_to_disk(odd/'one')
    assert load_data(f'datasets:{odd}/one').references() == expected
    for name, some in (('train-00000-of-00001', r[:2]), ('test-00000-of-00001', r[2:])):
        (odd/'pq/data').mkdir(parents=True, exist_ok=True)
        part(some).cast_column('image', datasets.Image(decode=False)).map(lambda x: {'image': {'bytes': Path(x['image']['path']).read_bytes(), 'path': None}} if x['image']['bytes'] is None else x).to_parquet(odd/f'pq/data/{name}.parquet')
    data = load_data(f'datasets:{odd}/pq', cache_dir=tmp_path/'cache')
    assert data.references() == expected and data.splits == {'train': 2, 'test': 1} and red(data[2]) == 2


def test_hub_image_folder(datasets, tmp_path):
    odd = tmp_path/'image folder'
    for s, n in (('train', 2), ('test', 1)):
        for i in range(n): picture(odd/s/f'{i}.png', i)
        (odd/s/'metadata.jsonl').write_text(''.join(json.dumps({'file_name': f'{i}.png', 'text': f'{s} {i}'}) + '\n' for i in range(n)))
    data = load_data(f'datasets:{odd}', cache_dir=tmp_path/'cache')
    assert data.splits == {'train': 2, 'test': 1} and sorted(c for r in data for c in r.captions) == ['test 0', 'train 0', 'train 1']
    assert all(red(r) == int(r.captions[0][-1]) for r in data)


def test_hub_offline_and_wrong(datasets, tmp_path):
    with pytest.raises(DataError, match='HF_HUB_OFFLINE'): load_data('datasets:nobody-here/no-such-set-of-captions', cache_dir=tmp_path)
    datasets.Dataset.from_list([{'label': 1, 'caption': 'x'}]).save_to_disk(tmp_path/'no image')
    with pytest.raises(DataError, match="no column of images; it has 'label', 'caption'"): load_data(f'datasets:{tmp_path}/no image')
    bad = [{'image': None, 'caption': c} for c in ('a', '', None)]
    datasets.Dataset.from_list(bad, features=datasets.Features(image=datasets.Image(), caption=datasets.Value('string'))).save_to_disk(tmp_path/'bad')
    with pytest.raises(DataError, match='row 1'): load_data(f'datasets:{tmp_path}/bad')


def test_hub_paths_are_never_looked_up(monkeypatch, tmp_path):
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    monkeypatch.chdir(tmp_path); (tmp_path/'mine').mkdir()
    for path in ('./flickr', 'flickr', 'mine/flickr', f'{tmp_path}/none', '~/none here', 'a/b/c', 'a\\b', 'x.parquet'):
        with pytest.raises(DataError, match='no such file or folder'): load_data(f'datasets:{path}')
    (tmp_path/'plain').mkdir()
    with pytest.raises(DataError, match='folder:'): load_data(f'datasets:{tmp_path}/plain')
    with pytest.raises(ConfigError, match='names no data set'): load_data('datasets:')


# --- the command
@every
def test_the_command(kind, tmp_path, capsys):
    f = kind(tmp_path)
    assert cli.main(['data', f.spec, '--html', str(tmp_path/'look.html')]) == 0
    out = capsys.readouterr().out
    assert re.search(rf'images +{len(f.expected)}\n', out) and 'page: ' in out
    html = (tmp_path/'look.html').read_text(encoding='utf-8')
    assert html.count('<img') == len(f.expected) and 'src="data:image/' in html and 'http' not in re.sub(r'\s+', ' ', re.sub('content="[^"]*"', '', html)).split('<body>')[1].split('Examples')[0]
    f.file.unlink()
    assert cli.main(['data', f.spec]) == 2 and f.file.name in capsys.readouterr().err


def test_the_command_counts_and_escapes(tmp_path, capsys):
    f = Karpathy(tmp_path).write(lambda d: (d['images'][0]['sentences'][0].update(raw='<script>alert(1)</script> "tile"'), d['images'][2].update(filename='x.jpg', filepath=''))[1])
    assert cli.main(['data', f.spec]) == 2 and 'x.jpg' not in capsys.readouterr().out
    (f.images/'val2014/COCO_val2014_000000000102.jpg').unlink()
    assert cli.main(['data', f.spec, '--skip-bad', '--html', str(tmp_path/'a.html'), '--examples', '2']) == 0
    out = capsys.readouterr().out
    assert 'train 1, restval 1, test 1' in out and 'left out, missing image: ' in out and 'images[2]' in out
    html = (tmp_path/'a.html').read_text(encoding='utf-8')
    assert '<script>' not in html and '&lt;script&gt;alert(1)' in html and 'missing image' in html
    assert cli.main(['data', f.spec + '@test']) == 0 and re.search(r'images +1\n', capsys.readouterr().out)
    assert cli.main(['data', f.spec + '@tets']) == 2 and 'did you mean test' in capsys.readouterr().err
    assert cli.main(['data', f.spec, '--skip-bad', '--html', str(tmp_path/'none/a.html')]) == 2


# --- cost
MEASURE = """
import json, sys, tempfile
from pathlib import Path
from PIL import Image
from capnb.data.karpathy import read_karpathy
n, folder = int(sys.argv[1]), Path(tempfile.mkdtemp())
raw = 'A man riding a wave on top of a surfboard in the sea.'
Image.new('RGB', (4, 4)).save(folder/'one.jpg')
with open(folder/'d.json', 'w') as f:
    f.write('{"images": [')
    for i in range(n):
        said = [{'tokens': raw.lower().split(), 'raw': raw, 'imgid': i, 'sentid': 5*i+j} for j in range(5)]
        f.write((', ' if i else '') + json.dumps({'filename': 'one.jpg', 'imgid': i, 'split': 'train', 'sentences': said, 'cocoid': i}))
    f.write(']}')
data = read_karpathy(folder/'d.json', folder)
assert len(data) == n and data.captions(n-1) == [raw]*5
peak = [line for line in open('/proc/self/status') if 'VmHWM' in line][0]
print(data.nbytes, int(peak.split()[1])*1024)
"""

@pytest.mark.skipif(not os.path.exists('/proc/self/status'), reason='the peak is read from Linux')
def test_memory_of_karpathy():
    "Two sizes give the bytes per image with five captions: held, and at the peak of reading"
    env = {**os.environ, 'PYTHONPATH': str(Path(__file__).resolve().parents[1])}
    sizes = 2_000, 8_000
    out = [tuple(map(int, subprocess.run([sys.executable, '-c', MEASURE, str(n)], capture_output=True, text=True, check=True, env=env).stdout.split())) for n in sizes]
    held, peak = ((b - a)/(sizes[1] - sizes[0]) for a, b in zip(*out))
    assert held < 450 and peak < 1000, (held, peak)  # 113,287 images: below 51 MB held, 113 MB at the peak, beside Python itself
