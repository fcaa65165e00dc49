"""The readers on real images, and what a million records cost."""
import json, os, subprocess, sys
import pytest
from capnb.data.load import load_data

@pytest.fixture
def coco(shared): return shared/'data'/'coco'

def test_real_coco(coco):
    data = load_data(f'coco:{coco/"captions.json"}:{coco/"images"}', instances=coco/'instances.json')
    raw, boxes = (json.loads((coco/f'{name}.json').read_text(encoding='utf-8')) for name in ('captions', 'instances'))
    assert len(data) == 80 and data.ids == [i['id'] for i in raw['images']]
    captions = {i: [a['caption'].strip() for a in raw['annotations'] if a['image_id'] == i] for i in data.ids}
    assert data.references() == captions
    names = {c['id']: c['name'] for c in boxes['categories']}
    for record in data:
        own = [a for a in boxes['annotations'] if a['image_id'] == record.id]
        assert [(o['category'], o['bbox']) for o in record.truth['objects']] == [(names[a['category_id']], a['bbox']) for a in own]
        assert max(record.load_image().size) <= 320
    assert sorted(i for _, test in data.folds(5) for i in test.ids) == sorted(data.ids)

def test_images_that_are_not_there(coco):
    from capnb.core.errors import DataError
    with pytest.raises(DataError, match='4500 missing image'):
        load_data(f'coco:{coco/"captions_val2017.json"}:{coco/"images"}', on_error='skip')

def test_same_split_in_another_process():
    code = ("from capnb.data.records import CaptionDataset, Record\n"
            "d = CaptionDataset.lazy(500, lambda i: Record(f'ä{i}', None, []))\n"
            "print(ascii((d.fraction(.02, 3).ids, d.split({'a': .02}, 3)['a'].ids, d.folds(50, 3)[7][1].ids)))")
    said = {subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True,
        env=os.environ | {'PYTHONHASHSEED': seed, 'LC_ALL': language}).stdout for seed, language in (('1', 'C'), ('2', 'tr_TR.UTF-8'))}
    assert len(said) == 1

MEASURE = """
import json, sys, tempfile
from pathlib import Path
from PIL import Image
from capnb.data.coco import read_coco
n, folder = int(sys.argv[1]), Path(tempfile.mkdtemp())
caption = 'A man riding a wave on top of a surfboard in the sea.'
with open(folder/'c.json', 'w') as f:
    f.write('{"images": [')
    for i in range(n): f.write(('' if not i else ', ') + '{"id": %d, "file_name": "%012d.png"}' % (i, 1))
    f.write('], "annotations": [')
    for i in range(5*n): f.write(('' if not i else ', ') + '{"id": %d, "image_id": %d, "caption": "%s"}' % (i, i % n, caption))
    f.write(']}')
Image.new('RGB', (4, 4)).save(folder/('%012d.png' % 1))
data = read_coco(folder/'c.json', folder)
assert len(data) == n and data[n-1].captions == [caption]*5
peak = [line for line in open('/proc/self/status') if 'VmHWM' in line][0]  # ru_maxrss would count the parent too
print(data.nbytes, int(peak.split()[1])*1024)
"""

@pytest.mark.skipif(not os.path.exists('/proc/self/status'), reason='the peak is read from Linux')
def test_memory_of_a_million():
    "Two sizes give the bytes per record, held and at the peak of reading a COCO file with five captions an image"
    sizes = 8_000, 32_000
    out = [tuple(map(int, subprocess.run([sys.executable, '-c', MEASURE, str(n)], capture_output=True, text=True, check=True).stdout.split())) for n in sizes]
    held, peak = ((b - a)/(sizes[1] - sizes[0]) for a, b in zip(*out))
    assert held < 450, f'{held:.0f} bytes a record'
    assert held < peak < 900, f'{peak:.0f} bytes a record at the peak'  # a million below 1 GB with the 50 MB of Python and Pillow
    print(f'held {held:.0f}, peak {peak:.0f} bytes a record')
