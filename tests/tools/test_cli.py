from click.testing import CliRunner

from lwfed.tools.cli import main


def test_a_data_set_that_nobody_knows_is_not_fetched():
    result = CliRunner().invoke(main, ["fetch", "cifar"])
    assert result.exit_code == 66
    assert "'cifar' is none of the data sets that can be downloaded: cifar10, cifar100," in result.output
