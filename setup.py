"Fills the fields that pyproject.toml calls dynamic, from settings.ini."
from configparser import ConfigParser
from pathlib import Path

from setuptools import setup

ini = ConfigParser(delimiters=["="], interpolation=None)
ini.read(Path(__file__).parent / "settings.ini", encoding="utf-8")
cfg = ini["DEFAULT"]
low, high = (int(cfg[k].split(".")[1]) for k in ("min_python", "max_python"))
status = {"3": "3 - Alpha", "4": "4 - Beta", "5": "5 - Production/Stable"}[cfg["status"]]


def lines(key): return [o.strip() for o in cfg[key].splitlines() if o.strip()]


setup(
    author=cfg["author"],
    license=cfg["license"],
    keywords=[o.strip() for o in cfg["keywords"].split(",")],
    classifiers=[f"Development Status :: {status}", "Intended Audience :: Science/Research",
                 *(f"Programming Language :: Python :: 3.{v}" for v in range(low, high + 1))],
    install_requires=lines("requirements"),
    extras_require={name: lines(f"{name}_requirements") for name in ("dev", "smol", "emoji", "hub", "qlora", "regions", "fast", "zeroshot")},
)
