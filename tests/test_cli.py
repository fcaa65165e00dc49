"The command `capnb`: quick help, errors in words, exit codes."
import os, subprocess, sys, time
from pathlib import Path
import pytest
from capnb.study import cli

ROOT = Path(__file__).resolve().parents[1]


def capnb(*argv, **env):
    return subprocess.run([sys.executable, '-m', 'capnb.study.cli', *map(str, argv)], cwd=ROOT, capture_output=True, text=True, timeout=120,
                          env={**os.environ, 'PYTHONPATH': str(ROOT), **env})


def test_help_is_quick_and_light():
    best = 9.
    for _ in range(3):
        start = time.perf_counter(); out = capnb('--help'); best = min(best, time.perf_counter() - start)
    assert out.returncode == 0 and all(c in out.stdout for c in cli.SUBCOMMANDS) and 'examples:' in out.stdout
    assert best < (.5 if os.cpu_count() > 1 and os.getloadavg()[0] < os.cpu_count() else 5)
    code = "import sys, capnb, capnb.study.cli as c; c.parser().format_help(); c.parser('study').format_help(); print([m for m in ('torch', 'transformers', 'spacy', 'numpy') if m in sys.modules])"
    assert subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True, env={**os.environ, 'PYTHONPATH': str(ROOT)}).stdout.strip() == '[]'


@pytest.mark.parametrize('argv,text', [
    (['studdy'], 'did you mean study'), (['study', '--data', 'no/such/folder', '--steps', '0'], 'whole number'), (['study', '--adapter', 'no/such'], 'no such adapter'),
    (['study', '--lr', 'lora=x'], 'learning rate'), (['report', 'no/such'], 'no study'), (['score', 'none.json', 'none.json'], 'none.json'), (['data', 'scnes'], 'scenes')])
def test_errors_are_sentences(argv, text, capsys):
    assert cli.main(argv) == 2
    err = capsys.readouterr().err
    assert text in err and 'Traceback' not in err


def test_unexpected_errors_have_no_traceback_either(monkeypatch, capsys):
    monkeypatch.delenv('CAPNB_DEBUG', raising=False)
    monkeypatch.setattr(cli, 'doctor_report', lambda args: 1 / 0)
    assert cli.main(['doctor']) == 1
    err = capsys.readouterr().err
    assert 'ZeroDivisionError' in err and 'CAPNB_DEBUG=1' in err and 'Traceback' not in err
    monkeypatch.setenv('CAPNB_DEBUG', '1')
    with pytest.raises(ZeroDivisionError): cli.main(['doctor'])


def test_control_c_says_how_to_go_on(monkeypatch, capsys):
    monkeypatch.delenv('CAPNB_DEBUG', raising=False)
    def stop(args): raise KeyboardInterrupt
    monkeypatch.setattr(cli, 'study', stop)
    assert cli.main(['study']) == 130 and 'the same command goes on' in capsys.readouterr().err


def test_a_closed_pipe_is_no_error():
    p = subprocess.run(f'{sys.executable} -m capnb.study.cli --help | head -1', shell=True, cwd=ROOT, capture_output=True, text=True, env={**os.environ, 'PYTHONPATH': str(ROOT)})
    assert 'usage' in p.stdout and 'Traceback' not in p.stderr
