"""Adversarial unlearning: take a concept out of a text-to-image diffusion model so that crafted prompts cannot bring it back.

Plain erasing moves the answer to one prompt; a few searched tokens before that prompt then find the concept again. Here every
training step first searches such tokens against the model as it stands, and erases what they find, while other prompts are held where they were.
With e(z, t, c) the noise prediction, e_0 the frozen original, c* the concept's prompt, '' the empty one, z_t on the model's own trajectories:

    target      y      = e_0(z_t, t, '') - eta (e_0(z_t, t, c*) - e_0(z_t, t, ''))             negative guidance eta, no gradient
    erase       l_ESD  = || e_theta(z_t, t, c) - y ||^2
    attack      c_adv  = argmin_c || e_theta(z_t, t, c) - e_0(z_t, t, c*) ||^2                  over k embeddings inserted in c*
    retain      l_r    = || e_theta(z_t^r, t, c_r) - e_0(z_t^r, t, c_r) ||^2                    other prompts c_r, z^r sampled with c_r
    step        theta <- Adam(l_ESD(theta, c_adv) + gamma l_r);   the first `warmup` steps with c_adv = c*

theta is the text encoder (its blocks and final norm; embeddings stay), which can then be plugged into any other model that shares the
tokenizer, or the U-Net. The attack is Adam (`Attack()`) or one signed step (`FAST`). With the text encoder as theta the U-Net never changes, so
neither do z_t and the targets: they are recorded once along guided DDIM runs, e_0 of both prompts included, and drawn from there (`TrajectoryPool`).

    model = load_pipeline("stable-diffusion-v1-4/")                  # a local folder; or `toy_diffusion()`; or your `TextToImage`
    result = AdvUnlearner().fit(model, ["church"], retain_prompts, generator=torch.Generator().manual_seed(0))
    report = evaluate_erasure(result.model, judge, ...)              # discrete, embedding and paraphrase attacks, and what is retained
    export_text_encoder(result.model, "text_encoder/")               # what transformers and diffusers load

The attacks that evaluate are not the one that trains: they compare *guided* predictions, since images are drawn with guidance, and keep whichever of
the plain prompt and what they found draws the concept most often. A greedy search over words often stops at some that are worse than none, so that
without the plain prompt among its candidates an attack can be weaker than no attack, and then flatters every defence.

There is no guarantee in this: an attack of unlimited budget on the embeddings always wins in the end, since the U-Net still can draw the concept.
Report attack rates with their budgets. Neighbours: ESD (`attack=None`), UCE, SalUn, RECE; STEREO (2024) is built for embedding attacks.

Source: Zhang, Chen, Jia, Zhang, Fan, Liu, Hong, Ding, Liu, "Defensive Unlearning with Adversarial Training for Robust Concept Erasure in
Diffusion Models", NeurIPS 2024, arXiv 2405.15234. ESD: Gandikota et al. 2023, arXiv 2303.07345. Attacks: UnlearnDiffAtk, Zhang et al.
2023, arXiv 2310.11868 (tokens); Pham et al. 2023, arXiv 2308.01508 (embeddings); the token search is that of Zou et al. 2023, arXiv 2307.15043.
"""

from surefoot.adversarial.adv_unlearn.attacks import (
    FAST,
    AdversarialPrompt,
    Attack,
    discrete_prompt_attack,
    plain_prompt,
    prompt_loss,
    soft_prompt_attack,
)
from surefoot.adversarial.adv_unlearn.backend import (
    StableDiffusion,
    TextToImage,
    condition,
    export_text_encoder,
    generate,
    load_pipeline,
    sample_latents,
)
from surefoot.adversarial.adv_unlearn.evaluate import (
    ErasureReport,
    Rate,
    discrete_attacks,
    embedding_attacks,
    evaluate_erasure,
    frechet_distance,
    strongest,
)
from surefoot.adversarial.adv_unlearn.prompts import RetainPrompts, prompts_without, spliced
from surefoot.adversarial.adv_unlearn.states import States, TrajectoryPool, guided_states, image_states
from surefoot.adversarial.adv_unlearn.unlearn import AdvUnlearner, Unlearned, UnlearnReport, esd_loss, retain_loss

__all__ = [
    "FAST",
    "AdvUnlearner",
    "AdversarialPrompt",
    "Attack",
    "ErasureReport",
    "Rate",
    "RetainPrompts",
    "StableDiffusion",
    "States",
    "TextToImage",
    "TrajectoryPool",
    "UnlearnReport",
    "Unlearned",
    "condition",
    "discrete_attacks",
    "discrete_prompt_attack",
    "embedding_attacks",
    "esd_loss",
    "evaluate_erasure",
    "export_text_encoder",
    "frechet_distance",
    "generate",
    "guided_states",
    "image_states",
    "load_pipeline",
    "plain_prompt",
    "prompt_loss",
    "prompts_without",
    "retain_loss",
    "sample_latents",
    "soft_prompt_attack",
    "spliced",
    "strongest",
]
