"""A Hugging Face Trainer's model is tuned by the loss, the data, the optimiser and the schedule that it has."""

import warnings

import pytest
import torch

import bilevel as bl
from bilevel.integrations import transformers as adapter

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")


class Sequences(torch.utils.data.Dataset):
    """The label: whether the first token comes again."""

    def __init__(self, seed, count):
        generator = torch.Generator().manual_seed(seed)
        self.tokens = torch.randint(1, 20, (count, 8), generator=generator)
        self.labels = (self.tokens[:, 1:] == self.tokens[:, :1]).any(1).long()

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return {"input_ids": self.tokens[index], "labels": self.labels[index], "note": "left out"}


def trainer(folder, **options):
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=20, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=8, pad_token_id=0,
    )  # fmt: skip
    settings = transformers.TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=16,
        learning_rate=3e-3,
        report_to=[],
        use_cpu=True,
        **options,
    )
    return transformers.Trainer(
        transformers.BertForSequenceClassification(config), settings,
        train_dataset=Sequences(0, 64), eval_dataset=Sequences(1, 64),
    )  # fmt: skip


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_trainers_model_is_tuned(tmp_path):
    hers = trainer(tmp_path)
    train, valid = adapter.data(hers)
    assert len(train) == 4 and len(valid) == 8
    with pytest.raises(ValueError, match=r"attention\.self\.dropout' does not act.*Dropout\(of="):
        bl.hyper.Tuning(hers.model, adapter.loss, adapter.loss, train, valid, hyper=[bl.hyper.Dropout()]).game()
    tuned = bl.tune(
        hers.model,
        adapter.loss,
        adapter.loss,
        train,
        valid,
        hyper=[bl.hyper.WeightDecay(), bl.hyper.Dropout(of=["*output.dropout", "dropout"])],
        optimizer=adapter.optimizer(hers),
        scheduler=adapter.scheduler(hers, 40),
        steps=40,
    )
    assert type(tuned.model) is type(hers.model)
    hers.model.load_state_dict(tuned.model.state_dict())
    told = hers.evaluate()["eval_loss"]
    batches = list(valid)
    with torch.no_grad():
        mine = sum(float(tuned.model.eval()(**batch).loss) for batch in batches) / len(batches)
    assert told == pytest.approx(mine, rel=1e-4)  # float32, in batches of the same size


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
def test_what_would_be_lost_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"weight_decay=0\.1.*WeightDecay\(\)"):
        adapter.optimizer(trainer(tmp_path, weight_decay=0.1))
    without = trainer(tmp_path)
    without.eval_dataset = None
    with pytest.raises(ValueError, match="no eval_dataset"):
        adapter.data(without)
    made = adapter.optimizer(without)([torch.zeros(1, requires_grad=True)])
    assert isinstance(made, torch.optim.AdamW) and made.defaults["lr"] == 3e-3
