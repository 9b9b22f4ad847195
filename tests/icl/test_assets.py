"""Archives: hash, absence, unknown names; on wheels that the tests make."""

import re
import zipfile

import pytest

from icl import assets
from icl.assets import Asset, AssetError, ask_hub, fetch, read_asset, sha256


@pytest.fixture
def registry(tmp_path, monkeypatch):
    """A registry of one wheel, and an empty cache."""
    shelf = tmp_path / "shelf"
    shelf.mkdir()
    wheel = shelf / "icl_test_asset-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("held.txt", "text")
        info = "icl_test_asset-1.0.dist-info"
        archive.writestr(
            f"{info}/METADATA",
            "Metadata-Version: 2.1\nName: icl-test-asset\nVersion: 1.0\n",
        )
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\n")
        archive.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("ICL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(shelf))
    pin(monkeypatch, sha256(wheel))
    return wheel


def pin(monkeypatch, digest):
    asset = Asset("icl-test-asset==1.0", digest, "a test file")
    monkeypatch.setitem(assets.ASSETS, "test", asset)


@pytest.mark.slow
def test_fetch_then_cache_which_must_not_be_damaged(registry):
    path = fetch("test")
    assert read_asset("test", "held.txt") == b"text"
    registry.unlink()
    assert fetch("test") == path
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(AssetError, match=sha256(path)):
        fetch("test")


@pytest.mark.slow
def test_another_hash_is_refused(registry, monkeypatch):
    pin(monkeypatch, "0" * 64)
    with pytest.raises(AssetError, match="icl-test-asset"):
        fetch("test")
    assert not list(assets.cache_dir().rglob("*.whl"))


@pytest.mark.slow
def test_no_network_and_nothing_cached(registry):
    registry.unlink()
    with pytest.raises(AssetError, match="icl-test-asset==1.0"):
        fetch("test")


def test_hub_replies(monkeypatch):
    import httpx2
    from huggingface_hub import HfApi, errors

    request = httpx2.Request("GET", "http://hub")
    absent = httpx2.Response(404, request=request)
    outcomes = {
        "there": None,
        "401 Invalid credentials.*token": errors.RepositoryNotFoundError(
            "401 Invalid\ncredentials", response=absent
        ),
        "unreachable": errors.OfflineModeIsEnabled("offline"),
    }
    for reply, outcome in outcomes.items():

        def answer(self, *_, outcome=outcome, **__):
            if outcome:
                raise outcome

        monkeypatch.setattr(HfApi, "repo_info", answer)
        assert re.search(reply, ask_hub("model", "a/b"))
    monkeypatch.setattr(HfApi, "repo_info", lambda *_, **__: 1 / 0)
    assert ask_hub("dataset", "a/b") == "unreachable"
