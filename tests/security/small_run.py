"""A small configuration."""

import yaml

VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}


def config(scenes, root):
    tiny = {"class_path": "agglom.teachers.TinyTeacher"}
    return {
        "model": {
            "student": {
                "class_path": "agglom.students.TimmStudent",
                "init_args": {"name": "vit_tiny_patch16_224", "kwargs": dict(VIT)},
            },
            "teachers": {"sam": {"encoder": {**tiny, "init_args": {"name": "sam", "pretrained": False}}}},
            "warmup_steps": 1,
        },
        "data": {"data": str(scenes), "batch_size": 4, "size": 32, "val_split": None, "num_workers": 0},
        "trainer": {"max_steps": 2, "default_root_dir": str(root), "accelerator": "cpu", "log_every_n_steps": 1},
    }


def write(path, value):
    path.write_text(yaml.safe_dump(value))
    return path
