"""What the report says of each metric: a line beside its name, and how it was measured."""

from components.scorecard import (
    ADHERENCE,
    CLIP,
    CMMD,
    COPYING,
    COVERAGE,
    DENSITY,
    DIVERSITY,
    FID,
    INCEPTION,
    KID,
    LOSS,
    NEAR_COPIES,
)

NOTES = {
    LOSS: "squared error of the prediction, all timesteps",
    CLIP: "100 × cosine of picture and prompt",
    KID: "distance from the test pictures",
    ADHERENCE: "share of pictures that show all their prompt says",
    CMMD: "distance from the test pictures, mean above all",
    COVERAGE: "share of test pictures with a drawn one nearby",
    DENSITY: "how deep the drawn pictures lie among real ones",
    DIVERSITY: "distance between pictures of one prompt",
    COPYING: "nearer to training pictures than unseen ones are; 0.5: as near",
    NEAR_COPIES: "share nearer to a training picture than 99 % of unseen ones",
    FID: "Fréchet distance, on this encoder's features",
    INCEPTION: "how sure and how varied the given classes are",
}
EXPLANATIONS = {
    LOSS: "Every test picture is noised at one timestep in each of four bands and the denoiser predicts. Timestep and"
    " noise are a function of the picture's bytes: every model gets the same. By slice: the same numbers over the"
    " pictures whose captions belong together (at least 10). Interval: BCa bootstrap over pictures.",
    CLIP: "Cosine between a drawn picture and its prompt in the encoder's space, times 100, negative values as 0"
    " (Hessel et al. 2021). Comparable only under one encoder. Interval: BCa bootstrap over pictures.",
    KID: "Unbiased squared maximum mean discrepancy between features of drawn and of real test pictures, cubic kernel"
    " (Binkowski et al. 2018), without the pairs that share a caption. Around 0, also slightly below, when nothing"
    " tells them apart. Interval: jackknife over prompts.",
    ADHERENCE: "Captions of the built-in data can be checked exactly: a reader tells size, colour, shape, background,"
    " count and position from the pixels, and all must agree. Interval: Wilson.",
    CMMD: "As KID, with a Gaussian kernel of width 10 on features of unit length, times 1000 (Jayasumana et al. 2024),"
    " in the unbiased form. It sees a shifted mean and hardly a lost variety. Interval: jackknife over prompts.",
    COVERAGE: "Share of real test pictures with a drawn picture, of another caption, nearer than their fifth real"
    " neighbour (Naeem et al. 2020). Falls when whole kinds of pictures are no longer drawn. Interval: Wilson's, at the"
    " variance of the jackknife.",
    DENSITY: "Into how many of those neighbourhoods a drawn picture falls, divided by five. About 1 for real pictures;"
    " above, the drawn ones crowd where real ones are common. Interval: jackknife over prompts.",
    DIVERSITY: "1 − cosine between the pictures that one prompt gives from different seeds, averaged over prompts. 0"
    " says that the seed changes nothing. Interval: BCa bootstrap over prompts.",
    COPYING: "For each drawn picture its nearest training picture in the encoder's space; how often that is nearer than"
    " for a real test picture, which the model has not seen (Meehan et al. 2020). 0.5: no nearer than chance; near 1:"
    " training pictures come back. Interval: Wilson's, at the variance of DeLong.",
    NEAR_COPIES: "Share of drawn pictures whose nearest training picture is nearer than for 99 % of the test pictures,"
    " both in the encoder's space and in pixels (root mean square). About 1 % or less without copying. Interval:"
    " Wilson.",
    FID: "Squared Fréchet distance between Gaussians fitted to real and drawn features (Heusel et al. 2017), of unit"
    " length times √D, not Inception's: no figure from elsewhere compares. Interval: jackknife over 20 groups.",
    INCEPTION: "Salimans et al. 2016, with the given classes as texts for the encoder instead of an Inception network."
    " Interval: jackknife over pictures.",
}
