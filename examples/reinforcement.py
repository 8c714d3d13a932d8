"""Reinforcement learning: a policy gradient, from log-probabilities and entropies of one pass over the logits.

A policy picks one of 1,000 actions in each of 16 states, of which 20 are good. The step is that of PPO: the ratio of
the new probability to the old one, clipped, times the advantage, and a bonus for entropy.
"""

import sys

import torch
from torch import Tensor, nn

import fusedloss
import fusedloss.functional as L

STATES, ACTIONS, GOOD = 16, 1_000, 20
BONUS = 1e-3


def losses(logits: Tensor, actions: Tensor, old: Tensor, advantage: Tensor) -> Tensor:
    new, entropy = L.log_probs(logits, actions, return_entropy=True)  # both have a gradient
    ratio = (new - old).exp()
    clipped = ratio.clamp(0.8, 1.2)
    return -(torch.minimum(ratio * advantage, clipped * advantage) + BONUS * entropy).mean()


def main() -> int:
    torch.manual_seed(0)
    head = nn.Linear(64, ACTIONS)
    nn.init.normal_(head.weight, std=0.01)
    policy = nn.Sequential(nn.Embedding(STATES, 64), nn.Tanh(), head)
    optimizer = torch.optim.Adam(policy.parameters(), 1e-2)
    good = torch.stack([torch.randperm(ACTIONS)[:GOOD] for _ in range(STATES)])
    rewards = []
    for _ in range(25):
        states = torch.randint(STATES, (512,))
        with torch.no_grad():
            logits = policy(states)
            actions = torch.distributions.Categorical(logits=logits).sample()
            old = L.log_probs(logits, actions)
        reward = (good[states] == actions[:, None]).any(1).float()
        advantage = (reward - reward.mean()) / (reward.std() + 1e-6)
        for _ in range(3):
            optimizer.zero_grad()
            losses(policy(states), actions, old, advantage).backward()
            optimizer.step()
        rewards.append(reward.mean().item())
    _, entropy = L.log_probs(policy(states), actions, return_entropy=True)
    print(fusedloss.explain(L.log_probs, policy(states), actions, return_entropy=True))
    print(f"reward {rewards[0]:.1%} to {rewards[-1]:.1%}, entropy {entropy.mean().item():.2f}")
    return 0 if rewards[-1] > 0.5 else 1


if __name__ == "__main__":
    sys.exit(main())
