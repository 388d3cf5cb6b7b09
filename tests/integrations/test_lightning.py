"""A LightningModule is tuned as any module, by its own training step."""

import warnings

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import bilevel as bl
from bilevel.integrations import lightning as adapter

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    lightning = pytest.importorskip("lightning")


class Classifier(lightning.LightningModule):
    def __init__(self, scheduler=False):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(12, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.1), nn.Linear(8, 2))
        self.scheduler = scheduler

    def forward(self, inputs):
        return self.net(inputs)

    def training_step(self, batch, _):
        value = cross_entropy(self(batch[0]), batch[1])
        self.log("train_loss", value)
        return {"loss": value}

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=3e-3, betas=(0.8, 0.99))
        if not self.scheduler:
            return optimizer
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 10)]


def data():
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(200, 12, generator=generator)
    labels = (inputs[:, 0] + 0.5 * torch.randn(200, generator=generator) > 0).long()
    return [(inputs[:60], labels[:60])], [(inputs[60:], labels[60:])]


def test_the_training_step_is_the_loss():
    torch.manual_seed(0)
    module, (train, valid) = Classifier(), data()
    tuning = bl.hyper.Tuning(module, adapter.loss, adapter.loss, train, valid, hyper=[bl.hyper.WeightDecay()])
    game = tuning.game()
    point = {name: game.initial(name) for name in game.names}
    found = game.loss("hyper", point, valid[0])
    wanted = cross_entropy(module.eval()(valid[0][0]), valid[0][1])
    torch.testing.assert_close(found, wanted)
    assert "forward" not in vars(module)


def test_a_module_is_tuned_and_trained_on_by_lightning(tmp_path):
    torch.manual_seed(0)
    module, (train, valid) = Classifier(), data()
    tuned = bl.tune(
        module,
        adapter.loss,
        adapter.loss,
        train,
        valid,
        hyper=[bl.hyper.WeightDecay(), bl.hyper.Dropout(), bl.hyper.LabelSmoothing()],
        optimizer=adapter.optimizer(module),
        steps=60,
    )
    assert isinstance(tuned.model, Classifier)
    assert not torch.equal(tuned.model.net[0].weight, module.net[0].weight)
    again = bl.retrain(tuned, steps=5)
    assert isinstance(again.models[0], Classifier)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning's own, of a loader of a list and no logger
        trainer = lightning.Trainer(
            max_steps=2, logger=False, enable_checkpointing=False, enable_progress_bar=False, accelerator="cpu",
            enable_model_summary=False, default_root_dir=tmp_path,
        )  # fmt: skip
        trainer.fit(tuned.model, torch.utils.data.DataLoader(train, batch_size=None))


def test_the_optimiser_has_its_options_and_a_scheduler_is_not_lost():
    made = adapter.optimizer(Classifier())([torch.zeros(1, requires_grad=True)])
    assert isinstance(made, torch.optim.AdamW)
    assert made.defaults["betas"] == (0.8, 0.99) and made.defaults["lr"] == 3e-3
    with pytest.raises(ValueError, match="returns a scheduler.*scheduler="):
        adapter.optimizer(Classifier(scheduler=True))


def test_a_step_without_a_loss_is_refused():
    class Manual(Classifier):
        def training_step(self, batch, _):
            return None

    train, valid = data()
    with pytest.raises(ValueError, match="training_step returned a NoneType"):
        bl.tune(
            Manual(), adapter.loss, adapter.loss, train, valid, hyper=[bl.hyper.WeightDecay()],
            optimizer=adapter.optimizer(Manual()), steps=5,
        )  # fmt: skip
