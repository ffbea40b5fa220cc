"""Where methods that let rows go inside an encoder or a decoder were published, one constant a paper."""

from tokeff.papers import Paper

TOME = Paper(
    "bolya2023tome", "Token Merging: Your ViT But Faster",
    "Bolya, Daniel and Fu, Cheng-Yang and Dai, Xiaoliang and Zhang, Peizhao and Feichtenhofer, Christoph and Hoffman, Judy", 2023,
    "2210.09461",
)  # fmt: skip
FASTV = Paper(
    "chen2024fastv",
    "An Image is Worth 1/2 Tokens After Layer 2: Plug-and-Play Inference Acceleration for Large Vision-Language Models",
    "Chen, Liang and Zhao, Haozhe and Liu, Tianyu and Bai, Shuai and Lin, Junyang and Zhou, Chang and Chang, Baobao", 2024, "2403.06764",
)  # fmt: skip
PYRAMIDDROP = Paper(
    "xing2024pyramiddrop", "PyramidDrop: Accelerating Your Large Vision-Language Models via Pyramid Visual Redundancy Reduction",
    "Xing, Long and Huang, Qidong and Dong, Xiaoyi and Lu, Jiajie and Zhang, Pan and Zang, Yuhang and Cao, Yuhang and He, Conghui and "
    "Wang, Jiaqi and Wu, Feng and Lin, Dahua", 2024, "2410.17247",
)  # fmt: skip
SPARSEVLM = Paper(
    "zhang2024sparsevlm", "SparseVLM: Visual Token Sparsification for Efficient Vision-Language Model Inference",
    "Zhang, Yuan and Fan, Chun-Kai and Ma, Junpeng and Zheng, Wenzhao and Huang, Tao and Cheng, Kuan and Gudovskiy, Denis and "
    "Okuno, Tomoyuki and Nakata, Yohei and Keutzer, Kurt and Zhang, Shanghang", 2024, "2410.04417",
)  # fmt: skip
DART = Paper(
    "wen2025dart", "Stop Looking for Important Tokens in Multimodal Language Models: Duplication Matters More",
    "Wen, Zichen and Gao, Yifeng and Wang, Shaobo and Zhang, Junyuan and Zhang, Qintong and Li, Weijia and He, Conghui and Zhang, Linfeng",
    2025, "2502.11494",
)  # fmt: skip
TRANSPRUNE = Paper(
    "li2025transprune", "TransPrune: Token Transition Pruning for Efficient Large Vision-Language Model",
    "Li, Ao and Duan, Yuxiang and Zhang, Jinghui and Ma, Congbo and Xie, Yutong and Carneiro, Gustavo and Yaqub, Mohammad and Wang, Hu",
    2025, "2507.20630",
)  # fmt: skip
IMA = Paper(
    "shukor2024ima", "Implicit Multimodal Alignment: On the Generalization of Frozen LLMs to Multimodal Inputs",
    "Shukor, Mustafa and Cord, Matthieu", 2024, "2405.16700",
)  # fmt: skip
