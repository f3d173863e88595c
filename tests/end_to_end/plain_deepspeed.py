"""A small language model on the bytes of a text, trained with DeepSpeed in its usual style. Nothing here knows LoQT.

deepspeed --num_gpus 2 plain_deepspeed.py --deepspeed_config plain_deepspeed.json --text FILE
"""

import argparse

import deepspeed
import torch
from torch import nn
from torch.utils.data import Dataset

WINDOW = 48
WIDTH = 63
HEADS = 3


class Text(Dataset):
    """Windows of bytes, and the byte that follows each of them."""

    def __init__(self, path):
        with open(path, "rb") as file:
            self.bytes = torch.tensor(list(file.read()))

    def __len__(self):
        return (len(self.bytes) - 1) // WINDOW

    def __getitem__(self, index):
        window = self.bytes[index * WINDOW :][: WINDOW + 1]
        return window[:-1], window[1:]


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.before_attention, self.before_mlp = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 173), nn.Linear(173, WIDTH)

    def forward(self, x):
        rows, length, _ = x.shape
        q, k, v = self.qkv(self.before_attention(x)).view(rows, length, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(rows, length, WIDTH))
        return x + self.down(nn.functional.gelu(self.up(self.before_mlp(x))))


class ByteModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.position = nn.Embedding(256, WIDTH), nn.Parameter(torch.zeros(WINDOW, WIDTH))
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 256)
        nn.init.normal_(self.embedding.weight, std=0.05)

    def forward(self, inputs, targets):
        x = self.embedding(inputs) + self.position[: inputs.shape[1]]
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x))
        return nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


def parse(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the launcher")
    parser.add_argument("--text", required=True)
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save_dir")
    parser.add_argument("--save_at", type=int, default=-1)
    parser.add_argument("--load_dir")
    return deepspeed.add_config_arguments(parser).parse_args(arguments)


def main(arguments=None):
    args = parse(arguments)
    torch.manual_seed(args.seed)
    model = ByteModel()
    engine, _, loader, _ = deepspeed.initialize(
        args=args, model=model, model_parameters=model.parameters(), training_data=Text(args.text)
    )
    done = 0
    if args.load_dir:
        path, state = engine.load_checkpoint(args.load_dir)
        assert path is not None, f"there is no checkpoint in {args.load_dir}"
        done = state["step"]
    for step, (inputs, targets) in enumerate(loader):
        if step < done:
            continue
        if step == args.steps:
            break
        loss = engine(inputs.to(engine.device), targets.to(engine.device))
        engine.backward(loss)
        engine.step()
        mean = loss.detach().clone()
        deepspeed.comm.all_reduce(mean)
        mean /= deepspeed.comm.get_world_size()
        if deepspeed.comm.get_rank() == 0:
            print(f"step {step} lr {engine.get_lr()[0]} loss {mean.item()}", flush=True)
        if step + 1 == args.save_at:
            engine.save_checkpoint(args.save_dir, client_state={"step": step + 1})
    return engine


if __name__ == "__main__":
    main()
