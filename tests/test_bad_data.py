"""Malformed data: each is an error that names file and record, or with on_error='skip' left out and counted."""
import json, os, random, struct, zlib
import pytest
from PIL import Image
from capnb.core.errors import ConfigError, DataError
from capnb.data.coco import read_coco
from capnb.data.folder import read_folder
from capnb.data.records import CaptionDataset, Record

N = 4  # records of the good sets below; the cases spoil number 2

def picture(i=0, size=(24, 16)):
    image = Image.effect_noise(size, 60).convert('RGB')
    image.putpixel((0, 0), (i, 0, 0))
    return image

@pytest.fixture
def coco(tmp_path):
    "A good set in COCO's form: (folder, the object to be written)"
    (tmp_path/'images').mkdir()
    for i in range(N): picture(i).save(tmp_path/'images'/f'{i}.png')
    return tmp_path, {'images': [{'id': i, 'file_name': f'{i}.png'} for i in range(N)],
        'annotations': [{'id': 10*i+j, 'image_id': i, 'caption': f'caption {j} of {i}'} for i in range(N) for j in range(2)]}

def both(read, words, reason, count=1):
    "`read` fails with all `words` in its message, and with on_error='skip' counts under `reason` (None: it fails all the same)"
    with pytest.raises(DataError) as e: read(on_error='raise')
    for word in words: assert word in str(e.value), f'{word!r} not in: {e.value}'
    if reason is None:
        with pytest.raises(DataError): read(on_error='skip')
        return None
    data = read(on_error='skip')
    assert data.skipped[reason] == count, data.skipped
    assert all(words[0] in place for place in data.skipped.places[reason])
    for record in data: assert record.load_image().mode == 'RGB' and record.captions
    return data

# --- elements of a COCO file: (change of the object, words in the message, reason, records left)
def image(**kw): return lambda d: d['images'][2].update(kw)
def note(**kw): return lambda d: d['annotations'][4].update(kw)
def drop(key, name): return lambda d: d[key][{'images': 2, 'annotations': 4}[key]].pop(name)
ELEMENTS = {
    'image missing': (image(file_name='gone.png'), ['c.json', 'images[2]', 'id 2', 'gone.png'], 'missing image', 3),
    'image is a folder': (image(file_name='.'), ['c.json', 'images[2]', 'id 2'], 'missing image', 3),
    'file name missing': (drop('images', 'file_name'), ['c.json', 'images[2]', 'id 2'], 'no image name', 3),
    'file name empty': (image(file_name='  '), ['c.json', 'images[2]', 'id 2'], 'no image name', 3),
    'file name a number': (image(file_name=2), ['c.json', 'images[2]', 'id 2'], 'no image name', 3),
    'file name leads out': (image(file_name='../c.json'), ['c.json', 'images[2]', 'leads out'], 'bad image name', 3),
    'file name leads out, deeper': (image(file_name='a/../../c.json'), ['c.json', 'images[2]', 'leads out'], 'bad image name', 3),
    'file name absolute': (image(file_name='/etc/hostname'), ['c.json', 'images[2]', 'leads out'], 'bad image name', 3),
    'file name absolute on Windows': (image(file_name='C:\\1.png'), ['c.json', 'images[2]', 'leads out'], 'bad image name', 3),
    'file name leads out on Windows': (image(file_name='..\\c.json'), ['c.json', 'images[2]', 'leads out'], 'bad image name', 3),
    'file name with a zero byte': (image(file_name='2.png\0'), ['c.json', 'images[2]', 'zero byte'], 'bad image name', 3),
    'file name half a character': (image(file_name='\ud83d.png'), ['c.json', 'images[2]', 'id 2'], 'missing image', 3),
    'file name far too long': (image(file_name='a'*5000), ['c.json', 'images[2]', 'id 2'], 'missing image', 3),
    'image id twice': (lambda d: d['images'].append({'id': 2, 'file_name': '3.png'}), ['c.json', 'images[4]', 'id 2'], 'duplicate id', 4),
    'annotation id twice': (note(id=11), ['c.json', 'annotation id 11'], 'duplicate id', 4),
    'image not an object': (lambda d: d['images'].append('4.png'), ['c.json', 'images[4]', 'str'], 'wrong shape', 4),
    'image id missing': (lambda d: d['images'].append({'file_name': '3.png'}), ['c.json', 'images[4]'], 'bad id', 4),
    'image id a list': (lambda d: d['images'].append({'file_name': '3.png', 'id': [1]}), ['c.json', 'images[4]'], 'bad id', 4),
    'image id not whole': (lambda d: d['images'].append({'file_name': '3.png', 'id': 1.5}), ['c.json', 'images[4]'], 'bad id', 4),
    'image id beyond 64 bits': (lambda d: d['images'].append({'file_name': '3.png', 'id': 2**70}), ['c.json', 'images[4]'], 'bad id', 4),
    'annotation not an object': (lambda d: d['annotations'].append(['a']), ['c.json', 'annotations[8]', 'list'], 'wrong shape', 4),
    'annotation null': (lambda d: d['annotations'].append(None), ['c.json', 'annotations[8]'], 'wrong shape', 4),
    'caption for an unknown image': (note(image_id=99), ['c.json', 'annotations[4]', '99'], 'caption for an unknown image', 4),
    'caption for text instead of a number': (note(image_id='2'), ['c.json', 'annotations[4]', "'2'"], 'caption for an unknown image', 4),
    'caption for no image': (drop('annotations', 'image_id'), ['c.json', 'annotations[4]'], 'caption for an unknown image', 4),
    'caption for a list': (note(image_id=[2]), ['c.json', 'annotations[4]'], 'caption for an unknown image', 4),
    'caption missing': (drop('annotations', 'caption'), ['c.json', 'annotations[4]', 'image_id 2'], 'caption is not text', 4),
    'caption null': (note(caption=None), ['c.json', 'annotations[4]', 'null'], 'caption is not text', 4),
    'caption a number': (note(caption=3), ['c.json', 'annotations[4]', '3'], 'caption is not text', 4),
    'caption a list': (note(caption=['a', 'dog']), ['c.json', 'annotations[4]', 'list'], 'caption is not text', 4),
    'caption empty': (note(caption=''), ['c.json', 'annotations[4]', 'image_id 2'], 'empty caption', 4),
    'caption blank': (note(caption=' \n\t '), ['c.json', 'annotations[4]', 'image_id 2'], 'empty caption', 4),
    'caption invisible': (note(caption='\u200b\ufeff'), ['c.json', 'annotations[4]', 'image_id 2'], 'empty caption', 4),
    'caption control characters': (note(caption='\x00\x07'), ['c.json', 'annotations[4]', 'image_id 2'], 'empty caption', 4),
    'caption half a character': (note(caption='a \ud83d'), ['c.json', 'annotations[4]', 'image_id 2'], 'broken text', 4),
    'image without captions': (lambda d: d.update(annotations=[a for a in d['annotations'] if a['image_id'] != 2]), ['c.json', 'image 2'], 'image without a caption', 3)}

@pytest.mark.parametrize('case', ELEMENTS)
def test_coco_element(coco, case):
    folder, good = coco
    change, words, reason, left = ELEMENTS[case]
    change(good)
    (folder/'c.json').write_text(json.dumps(good))
    data = both(lambda on_error: read_coco(folder/'c.json', folder/'images', on_error=on_error), words, reason)
    assert len(data) == left and data.skipped.total() == 1, data.skipped

# --- whole files: (bytes from the good object, words, reason or None for 'never')
def whole(d): return json.dumps(d).encode()
def without(*keys): return lambda d: whole({k: v for k, v in d.items() if k not in keys})
def replaced(**kw): return lambda d: whole(d | kw)
FILES = {
    'empty file': (lambda d: b'', ['c.json', 'empty'], None),
    'only blanks': (lambda d: b' \n\n ', ['c.json', 'empty'], None),
    'cut in the captions': (lambda d: whole(d)[:-70], ['c.json', 'line 1', 'cut off', 'annotations['], 'broken JSON'),
    'cut in the images': (lambda d: whole(d)[:60], ['c.json', 'cut off', 'images['], None),
    'cut after the last caption': (lambda d: whole(d)[:-2], ['c.json', 'cut off'], 'broken JSON'),
    'a comma missing': (lambda d: whole(d).replace(b'}, {"id": 21', b'} {"id": 21'), ['c.json', 'line 1', 'annotations[4]'], 'broken JSON'),
    'a comma too many': (lambda d: whole(d).replace(b'}]}', b'},]}'), ['c.json', 'line 1', 'annotations[7]'], 'broken JSON'),
    'two objects in a row': (lambda d: whole(d)*2, ['c.json', 'more text after the end'], 'broken JSON'),
    'single quotes': (lambda d: repr(d).encode(), ['c.json', 'line 1', 'broken'], None),
    'bad escape': (lambda d: whole(d).replace(b'caption 0 of 2', b'caption \\x of 2'), ['c.json', 'annotations[3]', 'escape'], 'broken JSON'),
    'line break in a string': (lambda d: whole(d).replace(b'caption 0 of 2', b'caption\n of 2'), ['c.json', 'annotations[3]', 'control character'], 'broken JSON'),
    'not JSON': (lambda d: b'image,caption\n0.png,A dog.', ['c.json', 'not hold JSON'], None),
    'a web page': (lambda d: b'<!DOCTYPE html><html>404</html>', ['c.json', '<!DOCTYPE'], None),
    'Latin-1': (lambda d: json.dumps(d).replace('caption 0 of 2', 'caf\xe9').encode('latin-1'), ['c.json', 'not UTF-8'], None),
    'UTF-16': (lambda d: json.dumps(d).encode('utf-16'), ['c.json', 'UTF-16'], None),
    'gzip': (lambda d: b'\x1f\x8b\x08\0' + zlib.compress(whole(d)), ['c.json', 'gzip', 'unpack'], None),
    'zip': (lambda d: b'PK\x03\x04' + whole(d), ['c.json', 'zip', 'unpack'], None),
    'nested too deeply': (lambda d: b'{"images": [' + b'['*200_000, ['c.json', 'nested'], None),
    'a results file': (lambda d: whole([{'image_id': 0, 'caption': 'a'}]), ['c.json', 'results file'], None),
    'another list': (lambda d: whole([1, 2]), ['c.json', 'list'], None),
    'an empty list': (lambda d: b'[]', ['c.json', 'list'], None),
    'an empty object': (lambda d: b'{}', ['c.json', 'nothing in it'], None),
    'a string': (lambda d: b'"hello"', ['c.json', 'not hold JSON'], None),
    'another object': (lambda d: whole({'info': 1, 'data': []}), ['c.json', "'data'"], None),
    'an instances file': (replaced(annotations=[{'image_id': 0, 'bbox': [0, 0, 1, 1], 'category_id': 1}]), ['c.json', 'instances file'], None),
    'a keypoints file': (replaced(annotations=[{'image_id': 0, 'bbox': [0, 0, 1, 1], 'keypoints': []}]), ['c.json', 'keypoints file'], None),
    'a test file without captions': (without('annotations'), ['c.json', 'without captions'], None),
    'images missing': (without('images'), ['c.json', "'annotations'"], None),
    'images an object': (replaced(images={'0': '0.png'}), ['c.json', "'images' is not a list"], None),
    'annotations null': (replaced(annotations=None), ['c.json', "'annotations' is not a list"], None),
    'no images': (replaced(images=[], annotations=[]), ['c.json', 'no usable record'], None),
    'no captions': (replaced(annotations=[]), ['c.json', 'image 0'], None)}

@pytest.mark.parametrize('case', FILES)
def test_coco_file(coco, case):
    folder, good = coco
    make, words, reason = FILES[case]
    (folder/'c.json').write_bytes(make(good))
    both(lambda on_error: read_coco(folder/'c.json', folder/'images', on_error=on_error), words, reason)

def test_coco_paths(coco):
    folder, good = coco
    (folder/'c.json').write_bytes(whole(good))
    for captions, images, words in [('none.json', 'images', ['none.json', 'no such file']), ('images', 'images', ['images', 'folder, not a file']),
            ('c.json', 'none', ['none', 'no such images folder']), ('c.json', 'c.json', ['c.json', 'file, not a folder']), ('', 'images', ['c.json', 'folder, not a file'])]:
        both(lambda on_error: read_coco(folder/captions, folder/images, on_error=on_error), words, None)
    with pytest.raises(ConfigError, match='skip'): read_coco(folder/'c.json', folder/'images', on_error='ignore')

# --- instances
BOX = {'id': 1, 'image_id': 2, 'category_id': 7, 'bbox': [1, 2, 3, 4]}
INSTANCES = {
    'captions instead': (lambda d: d, ['i.json', 'captions file'], None),
    'no categories': ({'annotations': [BOX]}, ['i.json', 'categories'], None),
    'other images': ({'annotations': [BOX | {'image_id': 77}], 'categories': [{'id': 7, 'name': 'dog'}]}, ['i.json', 'belongs to these images'], None),
    'three numbers': ({'annotations': [BOX, BOX | {'bbox': [1, 2, 3]}], 'categories': [{'id': 7, 'name': 'dog'}]}, ['i.json', 'annotations[1]', 'image_id 2'], 'bad box'),
    'negative width': ({'annotations': [BOX, BOX | {'bbox': [1, 2, -3, 4]}], 'categories': [{'id': 7, 'name': 'dog'}]}, ['i.json', 'annotations[1]'], 'bad box'),
    'not numbers': ({'annotations': [BOX, BOX | {'bbox': ['a', 0, 1, 1]}], 'categories': [{'id': 7, 'name': 'dog'}]}, ['i.json', 'annotations[1]'], 'bad box'),
    'infinite': ({'annotations': [BOX, BOX | {'bbox': [float('inf'), 0, 1, 1]}], 'categories': [{'id': 7, 'name': 'dog'}]}, ['i.json', 'annotations[1]'], 'bad box'),
    'not a number': ({'annotations': [BOX, BOX | {'bbox': [float('nan'), 0, 1, 1]}], 'categories': [{'id': 7, 'name': 'dog'}]}, ['i.json', 'annotations[1]'], 'bad box'),
    'unknown category': ({'annotations': [BOX, BOX | {'category_id': 8}], 'categories': [{'id': 7, 'name': 'dog'}]}, ['i.json', '8'], 'unknown category'),
    'category without a name': ({'annotations': [BOX], 'categories': [{'id': 7, 'name': 'dog'}, {'id': 8}]}, ['i.json', 'categories[1]'], 'wrong shape'),
    'annotation null': ({'annotations': [BOX, None], 'categories': [{'id': 7, 'name': 'dog'}]}, ['i.json', 'annotations[1]'], 'wrong shape')}

@pytest.mark.parametrize('case', INSTANCES)
def test_instances(coco, case):
    folder, good = coco
    make, words, reason = INSTANCES[case]
    (folder/'c.json').write_bytes(whole(good))
    (folder/'i.json').write_bytes(whole(make(good) if callable(make) else make))
    data = both(lambda on_error: read_coco(folder/'c.json', folder/'images', instances=folder/'i.json', on_error=on_error), words, reason)
    if data: assert data.find(2).truth == {'objects': [{'category': 'dog', 'bbox': [1, 2, 3, 4]}]} and data[0].truth == {'objects': []}

# --- folders: (files, words, reason or None, ids left); images 0.png .. 3.png are there
GOOD = ''.join(json.dumps({'image': f'{i}.png', 'caption': f'caption {i}'}) + '\n' for i in range(N))
def line(n, text): return '\n'.join(text if i == n else g for i, g in enumerate(GOOD.split('\n')))
TABLE = 'image,caption\n' + ''.join(f'{i}.png,caption {i}\n' for i in range(N))
TEXTS = {f'{i}.txt': f'caption {i}\n' for i in range(N)}
FOLDERS = {
    'jsonl: missing image': ({'captions.jsonl': line(2, '{"image": "gone.png", "caption": "x"}')}, ['captions.jsonl, line 3', 'gone.png'], 'missing image', 3),
    'jsonl: leads out': ({'captions.jsonl': line(2, '{"image": "../x.png", "caption": "x"}')}, ['captions.jsonl, line 3', 'leads out'], 'bad image name', 3),
    'jsonl: no image': ({'captions.jsonl': line(2, '{"caption": "x"}')}, ['captions.jsonl, line 3'], 'no image name', 3),
    'jsonl: no caption': ({'captions.jsonl': GOOD + '{"image": "2.png"}'}, ['captions.jsonl, line 5', '2.png'], 'caption is not text', 4),
    'jsonl: empty caption': ({'captions.jsonl': GOOD + '{"image": "2.png", "caption": ""}'}, ['captions.jsonl, line 5', '2.png'], 'empty caption', 4),
    'jsonl: caption a number': ({'captions.jsonl': GOOD + '{"image": "2.png", "captions": ["a", 1]}'}, ['captions.jsonl, line 5', '2.png'], 'caption is not text', 4),
    'jsonl: id for two images': ({'captions.jsonl': '{"id": "2.png", "image": "3.png", "caption": "x"}\n' + GOOD}, ['captions.jsonl, line 4', '3.png'], 'duplicate id', 4),
    'jsonl: id a list': ({'captions.jsonl': GOOD + '{"id": [1], "image": "2.png", "caption": "x"}'}, ['captions.jsonl, line 5'], 'bad id', 4),
    'jsonl: not an object': ({'captions.jsonl': line(2, '["2.png", "x"]')}, ['captions.jsonl, line 3', 'list'], 'wrong shape', 3),
    'jsonl: broken line': ({'captions.jsonl': line(2, '{"image": "2.png", caption}')}, ['captions.jsonl, line 3'], 'broken JSON', 3),
    'jsonl: cut off': ({'captions.jsonl': GOOD[:-8]}, ['captions.jsonl, line 4'], 'broken JSON', 3),
    'jsonl: wrong encoding': ({'captions.jsonl': line(2, '{"image": "2.png", "caption": "caf\xe9"}').encode('latin-1')}, ['captions.jsonl, line 3', 'UTF-8'], 'not UTF-8', 3),
    'jsonl: UTF-16': ({'captions.jsonl': GOOD.encode('utf-16')}, ['captions.jsonl', 'UTF-16'], None, 0),
    'jsonl: a JSON list': ({'captions.jsonl': json.dumps([{'image': '0.png', 'caption': 'x'}])}, ['captions.jsonl', 'JSON lines'], None, 0),
    'jsonl: an indented JSON file': ({'captions.jsonl': json.dumps({'a': 1}, indent=1)}, ['captions.jsonl', 'JSON lines'], None, 0),
    'jsonl: empty': ({'captions.jsonl': '\n'}, ['captions.jsonl', 'no usable record'], None, 0),
    'jsonl and csv': ({'captions.jsonl': GOOD, 'captions.csv': TABLE}, ['captions.jsonl, captions.csv', 'several'], None, 0),
    'csv: missing image': ({'captions.csv': TABLE.replace('2.png', 'gone.png')}, ['captions.csv, line 4', 'gone.png'], 'missing image', 3),
    'csv: empty caption': ({'captions.csv': TABLE + '2.png,\n'}, ['captions.csv, line 6', '2.png'], 'empty caption', 4),
    'csv: no header': ({'captions.csv': TABLE.split('\n', 1)[1]}, ['captions.csv, line 1', 'header'], None, 0),
    'csv: header without captions': ({'captions.csv': TABLE.replace('caption\n', 'label\n')}, ['captions.csv, line 1', 'header'], None, 0),
    'csv: comma without quotes': ({'captions.csv': TABLE.replace('caption 2', 'caption, 2')}, ['captions.csv, line 4', '3 fields'], 'wrong shape', 3),
    'csv: field missing': ({'captions.csv': TABLE.replace('2.png,', '')}, ['captions.csv, line 4', '1 fields'], 'wrong shape', 3),
    'csv: quote not closed': ({'captions.csv': TABLE.replace('caption 3', '"caption 3')}, ['captions.csv, line 5', 'quote'], 'broken table', 3),
    'csv: text after a quote': ({'captions.csv': TABLE.replace('caption 3', '"cap"tion 3')}, ['captions.csv, line 5', 'quote'], 'broken table', 3),
    'csv: wrong encoding': ({'captions.csv': TABLE.replace('caption 2', 'caf\xe9').encode('latin-1')}, ['captions.csv, line 4', 'UTF-8'], 'not UTF-8', 3),
    'csv: empty file': ({'captions.csv': ''}, ['captions.csv', 'empty'], None, 0),
    'csv: only a header': ({'captions.csv': 'image,caption\n'}, ['captions.csv', 'no usable record'], None, 0),
    'csv: an Excel file': ({'captions.csv': b'PK\x03\x04....'}, ['captions.csv', 'zip'], None, 0),
    'txt: missing': ({k: v for k, v in TEXTS.items() if k != '2.txt'}, ['set', '2.png'], 'image without a caption', 3),
    'txt: empty': (TEXTS | {'2.txt': ' \n'}, ['2.txt', '2.png'], 'empty caption', 3),
    'txt: without an image': (TEXTS | {'9.txt': 'nine'}, ['9.txt', 'no image'], 'caption for an unknown image', 4),
    'txt: wrong encoding': (TEXTS | {'2.txt': b'two\ncaf\xe9\n'}, ['2.txt, line 2', 'UTF-8'], 'not UTF-8', 4),
    'txt: UTF-16': (TEXTS | {'2.txt': 'two'.encode('utf-16')}, ['2.txt', 'UTF-16'], 'not UTF-8', 3),
    'nothing but images': ({}, ['set', '0.png'], None, 0)}

@pytest.mark.parametrize('case', FOLDERS)
def test_folder(tmp_path, case):
    files, words, reason, left = FOLDERS[case]
    folder = tmp_path/'set'; folder.mkdir()
    for i in range(N): picture(i).save(folder/f'{i}.png')
    for name, text in files.items(): (folder/name).write_bytes(text if isinstance(text, bytes) else text.encode())
    data = both(lambda on_error: read_folder(folder, on_error=on_error), words, reason)
    if data: assert len(data) == left

def test_folder_paths(tmp_path):
    (tmp_path/'a.json').write_text('{}')
    (tmp_path/'empty').mkdir()
    for path, words in [('none', ['none', 'no such folder']), ('a.json', ['a.json', 'file, not a folder']), ('empty', ['empty', 'no image']), ('', ['no image', 'coco:'])]:
        both(lambda on_error: read_folder(tmp_path/path, on_error=on_error), words, None)

# --- images that cannot be decoded: bytes of the file
def bytes_of(kind, image=None, **kw):
    import io
    f = io.BytesIO()
    (image or picture(size=(64, 48))).save(f, kind, **kw)
    return f.getvalue()
def chunk(kind, data): return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))
def png(width, height, body=b'\0'*10, extra=b''):
    return b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', struct.pack('>IIBBBBB', width, height, 8, 2, 0, 0, 0)) + extra + chunk(b'IDAT', zlib.compress(body)) + chunk(b'IEND', b'')
IMAGES = {
    'empty': (lambda: b'', 'undecodable image', 'empty'),
    'text': (lambda: b'hello', 'undecodable image', 'not an image'),
    'a web page': (lambda: b'<html>404 Not Found</html>'*50, 'undecodable image', 'not an image'),
    'random bytes': (lambda: random.Random(0).randbytes(4000), 'undecodable image', 'not an image'),
    'a zip file': (lambda: b'PK\x03\x04' + b'\0'*500, 'undecodable image', 'not an image'),
    'svg': (lambda: b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>', 'undecodable image', 'not an image'),
    'jpeg cut off': (lambda: bytes_of('JPEG')[:-300], 'undecodable image', 'cut off'),
    'jpeg header only': (lambda: bytes_of('JPEG')[:30], 'undecodable image', ''),
    'png cut off': (lambda: bytes_of('PNG')[:-400], 'undecodable image', 'cut off'),
    'png signature only': (lambda: b'\x89PNG\r\n\x1a\n', 'undecodable image', ''),
    'png body missing': (lambda: png(9, 9)[:-30], 'undecodable image', ''),
    'png checksum wrong': (lambda: png(2, 2, b'\0'*14).replace(b'IHDR\0\0\0\2', b'IHDR\0\0\0\3'), 'undecodable image', ''),
    'gif cut off': (lambda: bytes_of('GIF')[:200], 'undecodable image', ''),
    'webp cut off': (lambda: bytes_of('WEBP')[:200], 'undecodable image', ''),
    'bmp cut off': (lambda: bytes_of('BMP')[:500], 'undecodable image', 'cut off'),
    'tiff cut off': (lambda: bytes_of('TIFF')[:100], 'undecodable image', ''),
    'bomb, 100 million pixels': (lambda: png(10_000, 10_000), 'image too large', '100,000,000'),
    'bomb, 2.5 billion pixels': (lambda: png(50_000, 50_000), 'image too large', '2500000000'),
    'bomb in the text': (lambda: png(2, 2, b'\0'*14, chunk(b'zTXt', b'a\0\0' + zlib.compress(b'\0'*70_000_000))), 'undecodable image', '')}

@pytest.mark.parametrize('case', IMAGES)
@pytest.mark.filterwarnings('ignore')
def test_image(coco, case):
    folder, good = coco
    make, reason, word = IMAGES[case]
    (folder/'images'/'2.png').write_bytes(make())
    (folder/'c.json').write_bytes(whole(good))
    data = read_coco(folder/'c.json', folder/'images')  # on demand: reading the list does not decode
    assert len(data) == N and data[1].load_image().size == (24, 16)
    for attempt in (data[2].load_image, data.check_images, lambda: read_coco(folder/'c.json', folder/'images', check_images=True)):
        with pytest.raises(DataError) as e: attempt()
        for part in ('2.png', 'record 2', word): assert part in str(e.value), str(e.value)
    for left in (data.check_images('skip'), read_coco(folder/'c.json', folder/'images', on_error='skip')):
        assert left.ids == [0, 1, 3] and left.skipped == {reason: 1} and '2.png' in left.skipped.places[reason][0]
    assert len(read_coco(folder/'c.json', folder/'images', on_error='skip', check_images=False)) == N

def test_image_gone_after_reading(coco):
    folder, good = coco
    (folder/'c.json').write_bytes(whole(good))
    data = read_coco(folder/'c.json', folder/'images')
    os.remove(folder/'images'/'2.png'); os.remove(folder/'images'/'3.png'); (folder/'images'/'3.png').mkdir()
    with pytest.raises(DataError, match='not there.*2.png, record 2'): data[2].load_image()
    with pytest.raises(DataError, match='folder.*3.png, record 3'): data[3].load_image()
    assert data.check_images('skip').skipped == {'missing image': 2}

def test_image_behind_a_broken_link(coco):
    folder, good = coco
    os.remove(folder/'images'/'2.png')
    try: os.symlink(folder/'nowhere', folder/'images'/'2.png')
    except OSError: pytest.skip('links cannot be made here')
    (folder/'c.json').write_bytes(whole(good))
    both(lambda on_error: read_coco(folder/'c.json', folder/'images', on_error=on_error), ['c.json', 'images[2]', 'id 2'], 'missing image')

# --- odd images that are good
def exif(i, **kw):
    e = Image.Exif(); e[0x0112] = i
    return dict(exif=e, **kw)
ODD = {
    'cmyk jpeg': lambda p: Image.new('CMYK', (4, 2), (0, 0, 0, 0)).save(p, 'JPEG'),
    'grey': lambda p: Image.new('L', (4, 2), 255).save(p, 'PNG'),
    'one bit': lambda p: Image.new('1', (4, 2), 1).save(p, 'PNG'),
    '16 bits': lambda p: Image.new('I;16', (4, 2), 65535).save(p, 'PNG'),
    'floats': lambda p: Image.new('F', (4, 2), 1.).save(p, 'TIFF'),
    'transparent': lambda p: Image.new('RGBA', (4, 2), (0, 0, 0, 0)).save(p, 'PNG'),
    'palette with a transparent colour': lambda p: Image.new('P', (4, 2), 0).save(p, 'PNG', transparency=0),
    'grey with a transparent level': lambda p: Image.new('L', (4, 2), 7).save(p, 'PNG', transparency=7),
    'animation': lambda p: Image.new('RGB', (4, 2), 'white').save(p, 'GIF', save_all=True, append_images=[Image.new('RGB', (4, 2), 'black')]),
    'sideways': lambda p: Image.new('RGB', (2, 4), 'white').save(p, 'JPEG', **exif(6)),
    'sideways the other way': lambda p: Image.new('RGB', (2, 4), 'white').save(p, 'JPEG', **exif(8)),
    'EXIF that makes no sense': lambda p: Image.new('RGB', (4, 2), 'white').save(p, 'JPEG', exif=b'Exif\0\0II*\0\xff\xff\xff\xff'),
    'one pixel high': lambda p: Image.new('RGB', (4, 1), 'white').resize((4, 2)).save(p, 'BMP')}

@pytest.mark.parametrize('case', ODD)
@pytest.mark.filterwarnings('ignore')  # Pillow's own words on the broken EXIF
def test_odd_image(tmp_path, case):
    ODD[case](tmp_path/'x.jpg')  # the suffix does not matter
    image = Record(1, tmp_path/'x.jpg', ['white']).load_image()
    assert image.mode == 'RGB' and image.size == (4, 2) and min(image.getpixel((1, 1))) > 250, (image, image.getpixel((1, 1)))

# --- records from a program
def test_records():
    good = [Record(i, picture(i), ['x']) for i in range(N)]
    for bad, reason in [(Record(2, None, ['y']), 'duplicate id'), (Record('', None, ['y']), 'bad id'), (Record(None, None, ['y']), 'bad id'), (Record(1.5, None, ['y']), 'bad id'),
            (Record(9, None, 'y'), 'caption is not text'), (Record(9, None, [None]), 'caption is not text'), (Record(9, None, ['']), 'empty caption'), ('y', 'not a record')]:
        both(lambda on_error: CaptionDataset.from_records(good + [bad], on_error=on_error), ['records, record 5'], reason)
    with pytest.raises(DataError, match='record 7'): CaptionDataset.from_records([Record(7, lambda: 1/0, ['x'])])[0].load_image()

# --- nothing but a DataError, whatever the bytes
def spoil(data, rng):
    data = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        i = rng.randrange(len(data))
        kind = rng.randrange(4)
        if kind == 0: data[i] = rng.randrange(256)
        elif kind == 1: del data[i:i+rng.randint(1, 20)]
        elif kind == 2: data[i:i] = rng.randbytes(rng.randint(1, 4))
        else: data[i] = rng.choice(b'{}[]",:\\\n\r\t ')
        if not data: return b''
    return bytes(data)

@pytest.mark.parametrize('form', ['json', 'jsonl', 'csv', 'png', 'jpg', 'gif'])
@pytest.mark.filterwarnings('ignore')
def test_spoiled_bytes(coco, form):
    folder, good = coco
    rng = random.Random(form)
    (folder/'c.json').write_bytes(whole(good))
    path = {'json': folder/'c.json', 'jsonl': folder/'images'/'captions.jsonl', 'csv': folder/'images'/'captions.csv'}.get(form, folder/'images'/'2.png')
    source = {'json': whole(good), 'jsonl': GOOD.encode(), 'csv': TABLE.encode(), 'png': bytes_of('PNG'), 'jpg': bytes_of('JPEG'), 'gif': bytes_of('GIF')}[form]
    read = (lambda **kw: read_folder(folder/'images', check_images=True, **kw)) if 'captions' in path.name else (lambda **kw: read_coco(folder/'c.json', folder/'images', check_images=True, **kw))
    read_or_not = 0
    for i in range(60):
        path.write_bytes(source[:len(source)*i//20] if i < 20 else spoil(source, rng))
        for on_error in ('raise', 'skip'):
            try: data = read(on_error=on_error)
            except DataError as e: assert path.name in str(e) or 'c.json' in str(e)
            else: read_or_not += 1; assert 0 < len(data) <= N + 8 and data.references()
    assert read_or_not

def test_enough_cases():
    assert len(ELEMENTS) + len(FILES) + len(INSTANCES) + len(FOLDERS) + len(IMAGES) > 120
