from prefixmem_fast.examples import next_item


def test_a_newcomer_gets_recommendations(tmp_path, capsys):
    assert next_item.main(["--steps", "100", "--out", str(tmp_path)]) > 0.25  # by chance 0.03
    assert "recall of the next item among 10 of 300" in capsys.readouterr().out
    assert sorted(path.name for path in (tmp_path / "adapters" / "prefixmem").iterdir())[0] == "config.json"
