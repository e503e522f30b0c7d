from lwfed.seeds import derive


def test_a_stream_is_named_by_all_its_labels():
    streams = [
        derive(0, "views"),
        derive(1, "views"),
        derive(0, "views", 1),
        derive(0, "views", 1, 2),
        derive(0, "views", 12),
        derive(0, "init", 1),
    ]
    assert len(set(streams)) == len(streams)
    assert all(0 <= seed < 2**63 for seed in streams)


def test_streams_never_change_between_releases():
    assert derive(0, "views", 1, 2) == 5130973889253452689
