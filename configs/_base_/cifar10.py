# CIFAR-10 from scratch in a few minutes on one GPU, e.g.
# `visionssm train vmamba-nano_cifar10 --compile-mode reduce-overhead --cfg-options data_root=FOLDER`.
_base_ = ["models/cifar10-classifier.py", "datasets/cifar10.py", "schedules/cifar10.py", "runtimes/cifar10.py"]
