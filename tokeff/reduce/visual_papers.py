"""Where methods that reduce the rows of pictures and videos were published, one constant a paper."""

from tokeff.papers import Paper

FASTERVLM = Paper(
    "zhang2024fastervlm", "[CLS] Attention is All You Need for Training-Free Visual Token Pruning: Make VLM Inference Faster",
    "Zhang, Qizhe and Cheng, Aosong and Lu, Ming and Zhuo, Zhiyong and Wang, MinQi and Cao, Jiajun and Guo, Shaobo and She, Qi and "
    "Zhang, Shanghang", 2024, "2412.01818",
)  # fmt: skip
VISPRUNER = Paper(
    "zhang2025vispruner", "Beyond Text-Visual Attention: Exploiting Visual Cues for Effective Token Pruning in VLMs",
    "Zhang, Qizhe and Cheng, Aosong and Lu, Ming and Zhang, Renrui and Zhuo, Zhiyong and Cao, Jiajun and Guo, Shaobo and She, Qi and "
    "Zhang, Shanghang", 2025, "2412.01818",
)  # fmt: skip
VISIONZIP = Paper(
    "yang2024visionzip", "VisionZip: Longer is Better but Not Necessary in Vision Language Models",
    "Yang, Senqiao and Chen, Yukang and Tian, Zhuotao and Wang, Chengyao and Li, Jingyao and Yu, Bei and Jia, Jiaya", 2024, "2412.04467",
)  # fmt: skip
DIVPRUNE = Paper(
    "alvar2025divprune", "DivPrune: Diversity-based Visual Token Pruning for Large Multimodal Models",
    "Alvar, Saeed Ranjbar and Singh, Gursimran and Akbari, Mohammad and Zhang, Yong", 2025, "2503.02175",
)  # fmt: skip
HIPRUNE = Paper(
    "liu2025hiprune", "HiPrune: Training-Free Visual Token Pruning via Hierarchical Attention in Vision-Language Models",
    "Liu, Jizhihui and Du, Feiyi and Zhu, Guangdao and Lian, Niu and Li, Jun and Chen, Bin", 2025, "2508.00553",
)  # fmt: skip
PRUMERGE = Paper(
    "shang2024prumerge", "LLaVA-PruMerge: Adaptive Token Reduction for Efficient Large Multimodal Models",
    "Shang, Yuzhang and Cai, Mu and Xu, Bingxin and Lee, Yong Jae and Yan, Yan", 2024, "2403.15388",
)  # fmt: skip
FLOWCUT = Paper(
    "tong2025flowcut", "FlowCut: Rethinking Redundancy via Information Flow for Efficient Vision-Language Models",
    "Tong, Jintao and Jin, Wenwei and Qin, Pengda and Li, Anqi and Zou, Yixiong and Li, Yuhong and Li, Yuhua and Li, Ruixuan", 2025,
    "2505.19536",
)  # fmt: skip
VFLOWOPT = Paper(
    "yang2025vflowopt", "VFlowOpt: A Token Pruning Framework for LMMs with Visual Information Flow-Guided Optimization",
    "Yang, Sihan and Xu, Runsen and Cui, Chenhang and Wang, Tai and Lin, Dahua and Pang, Jiangmiao", 2025, "2508.05211",
)  # fmt: skip
TODRE = Paper(
    "li2025todre", "ToDRE: Effective Visual Token Pruning via Token Diversity and Task Relevance",
    "Li, Duo and Yang, Zuhao and Zhang, Xiaoqin and Shao, Ling and Lu, Shijian", 2025, "2505.18757",
)  # fmt: skip
TOKENCORR = Paper(
    "zhang2024tokencorr", "Token-level Correlation-guided Compression for Efficient Multimodal Document Understanding",
    "Zhang, Renshan and Lyu, Yibo and Shao, Rui and Chen, Gongwei and Guan, Weili and Nie, Liqiang", 2024, "2407.14439",
)  # fmt: skip
CATP = Paper(
    "li2025catp", "CATP: Contextually Adaptive Token Pruning for Efficient and Enhanced Multimodal In-Context Learning",
    "Li, Yanshu and Yang, Jianjiang and Shen, Zhennan and Han, Ligong and Xu, Haoyan and Tang, Ruixiang", 2025, "2508.07871",
)  # fmt: skip
AIM = Paper(
    "zhong2024aim", "AIM: Adaptive Inference of Multi-Modal LLMs via Token Merging and Pruning",
    "Zhong, Yiwu and Liu, Zhuoming and Li, Yin and Wang, Liwei", 2024, "2412.03248",
)  # fmt: skip
MUSTDROP = Paper(
    "liu2024mustdrop", "Multi-Stage Vision Token Dropping: Towards Efficient Multimodal Large Language Model",
    "Liu, Ting and Shi, Liangtao and Hong, Richang and Hu, Yue and Yin, Quanjun and Zhang, Linfeng", 2024, "2411.10803",
)  # fmt: skip
CDPRUNER = Paper(
    "zhang2025cdpruner", "Beyond Attention or Similarity: Maximizing Conditional Diversity for Token Pruning in MLLMs",
    "Zhang, Qizhe and Liu, Mengzhen and Li, Lichen and Lu, Ming and Zhang, Yuan and Pan, Junwen and She, Qi and Zhang, Shanghang", 2025,
    "2506.10967",
)  # fmt: skip
HIRED = Paper(
    "arif2024hired",
    "HiRED: Attention-Guided Token Dropping for Efficient Inference of High-Resolution Vision-Language Models in Resource-Constrained "
    "Environments",
    "Arif, Kazi Hasan Ibn and Yoon, JinYi and Nikolopoulos, Dimitrios S. and Vandierendonck, Hans and John, Deepu and Ji, Bo", 2024,
    "2408.10945",
)  # fmt: skip
GLOBALCOM2 = Paper(
    "liu2025globalcom2",
    "Global Compression Commander: Plug-and-Play Inference Acceleration for High-Resolution Large Vision-Language Models",
    "Liu, Xuyang and Wang, Ziming and Chen, Junjie and Han, Yuhang and Wang, Yingyao and Yuan, Jiale and Song, Jun and Zhang, Linfeng and "
    "Huang, Siteng and Chen, Honggang", 2025, "2501.05179",
)  # fmt: skip
HOLITOM = Paper(
    "shao2025holitom", "HoliTom: Holistic Token Merging for Fast Video Large Language Models",
    "Shao, Kele and Tao, Keda and Qin, Can and You, Haoxuan and Sui, Yang and Wang, Huan", 2025, "2505.21334",
)  # fmt: skip
DYCOKE = Paper(
    "tao2024dycoke", "DyCoke: Dynamic Compression of Tokens for Fast Video Large Language Models",
    "Tao, Keda and Qin, Can and You, Haoxuan and Sui, Yang and Wang, Huan", 2024, "2411.15024",
)  # fmt: skip
SORA = Paper(
    "kim2025ondevicesora", "On-device Sora: Enabling Training-Free Diffusion-based Text-to-Video Generation for Mobile Devices",
    "Kim, Bosung and Lee, Kyuhwan and Jeong, Isu and Cheon, Jungmin and Lee, Yeojin and Lee, Seulki", 2025, "2502.04363",
)  # fmt: skip
FASTVID = Paper(
    "shen2025fastvid", "FastVID: Dynamic Density Pruning for Fast Video Large Language Models",
    "Shen, Leqi and Gong, Guoqiang and He, Tao and Zhang, Yifeng and Liu, Pengzhang and Zhao, Sicheng and Ding, Guiguang", 2025,
    "2503.11187",
)  # fmt: skip
