"""What training writes is what `visionssm classify` reads."""

import os

import pytest
from PIL import Image

from visionssm.cli import main
from visionssm.engine.launch import main_train


@pytest.fixture
def trained(tiny, capsys):
    config, work = tiny
    assert main_train([str(config), "--work-dir", str(work), "--cfg-options", "train_cfg.max_epochs=1"]) == 0
    capsys.readouterr()
    return work


def test_work_directory_and_checkpoint_say_the_same(trained, tmp_path, capsys):
    """The folder counts what was written last: the export for timm, or the checkpoint of a run that was resumed and interrupted."""
    image = tmp_path / "image.png"
    Image.linear_gradient("L").save(image)
    checkpoint = trained / "epoch_1.pth"

    def classify(model):
        assert main(["classify", str(model), str(image), "--top", "10", "--device", "cpu"]) == 0
        out, err = capsys.readouterr()
        assert err == ""
        header, *lines = out.splitlines()
        return header, lines

    by_folder = classify(trained)
    by_file = classify(checkpoint)
    assert by_folder[0] == f"test_resnet from {trained / 'timm'}: 10 classes, 32 x 32 pixels, on cpu"
    assert by_file[0] == f"test_resnet from {checkpoint}: 10 classes, 32 x 32 pixels, on cpu"
    assert by_file[1] == by_folder[1]
    assert sorted(line.split()[1] for line in by_file[1][2:]) == list("0123456789")
    os.utime(checkpoint)
    assert str(checkpoint) in classify(trained)[0]
