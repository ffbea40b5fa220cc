"""Where each method was published, one constant a paper, for `tokeff methods --bibtex`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Paper:
    """Where a method was published. `id` is an arXiv number, or a place where there is none."""

    key: str
    title: str
    authors: str
    year: int
    id: str

    def bibtex(self) -> str:
        link = f"eprint = {{{self.id}}},\n  archivePrefix = {{arXiv}}" if self.id[:4].isdigit() else f"howpublished = {{{self.id}}}"
        return (
            f"@misc{{{self.key},\n  title = {{{self.title}}},\n  author = {{{self.authors}}},\n"
            f"  year = {{{self.year}}},\n  {link}\n}}"
        )


STREAMING = Paper(
    "xiao2023streamingllm", "Efficient Streaming Language Models with Attention Sinks",
    "Xiao, Guangxuan and Tian, Yuandong and Chen, Beidi and Han, Song and Lewis, Mike", 2023, "2309.17453",
)  # fmt: skip
H2O = Paper(
    "zhang2023h2o", "H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large Language Models",
    "Zhang, Zhenyu and Sheng, Ying and Zhou, Tianyi and Chen, Tianlong and Zheng, Lianmin and Cai, Ruisi and Song, Zhao and "
    "Tian, Yuandong and R{\\'e}, Christopher and Barrett, Clark and Wang, Zhangyang and Chen, Beidi", 2023, "2306.14048",
)  # fmt: skip
INFINITE = Paper(
    "han2023lminfinite", "LM-Infinite: Zero-Shot Extreme Length Generalization for Large Language Models",
    "Han, Chi and Wang, Qifan and Peng, Hao and Xiong, Wenhan and Chen, Yu and Ji, Heng and Wang, Sinong", 2023, "2308.16137",
)  # fmt: skip
TOVA = Paper(
    "oren2024tova", "Transformers are Multi-State RNNs",
    "Oren, Matanel and Hassid, Michael and Yarden, Nir and Adi, Yossi and Schwartz, Roy", 2024, "2401.06104",
)  # fmt: skip
A2SF = Paper(
    "jo2024a2sf", "A2SF: Accumulative Attention Scoring with Forgetting Factor for Token Pruning in Transformer Decoder",
    "Jo, Hyun-rae and Shin, Dongkun", 2024, "2407.20485",
)  # fmt: skip
ALISA = Paper(
    "zhao2024alisa", "ALISA: Accelerating Large Language Model Inference via Sparsity-Aware KV Caching",
    "Zhao, Youpeng and Wu, Di and Wang, Jun", 2024, "2403.17312",
)  # fmt: skip
KNORM = Paper(
    "devoto2024knorm", "A Simple and Effective L2 Norm-Based Strategy for KV Cache Compression",
    "Devoto, Alessio and Zhao, Yu and Scardapane, Simone and Minervini, Pasquale", 2024, "2406.11430",
)  # fmt: skip
KEYDIFF = Paper(
    "park2025keydiff",
    "KeyDiff: Key Similarity-Based KV Cache Eviction for Long-Context LLM Inference in Resource-Constrained Environments",
    "Park, Junyoung and Jones, Dalton and Morse, Matthew J and Goel, Raghavv and Lee, Mingu and Lott, Chris", 2025, "2504.15364",
)  # fmt: skip
LAGKV = Paper(
    "liang2025lagkv", "LagKV: Lag-Relative Information of the KV Cache Tells Which Tokens Are Important",
    "Liang, Manlai and Zhang, JiaMing and Li, Xiong and Li, Jinlong", 2025, "2504.04704",
)  # fmt: skip
CHUNKKV = Paper(
    "liu2025chunkkv", "ChunkKV: Semantic-Preserving KV Cache Compression for Efficient Long-Context LLM Inference",
    "Liu, Xiang and Tang, Zhenheng and Dong, Peijie and Li, Zeyu and Liu, Yue and Li, Bo and Hu, Xuming and Chu, Xiaowen",
    2025, "2502.00299",
)  # fmt: skip
EXPECTED = Paper(
    "devoto2025expected", "Expected Attention: KV Cache Compression by Estimating Attention from Future Queries Distribution",
    "Devoto, Alessio and Jeblick, Maximilian and J{\\'e}gou, Simon", 2025, "2510.00636",
)  # fmt: skip
RKV = Paper(
    "cai2025rkv", "R-KV: Redundancy-aware KV Cache Compression for Reasoning Models",
    "Cai, Zefan and Xiao, Wen and Sun, Hanshi and Luo, Cheng and Zhang, Yikai and Wan, Ke and Li, Yucheng and Zhou, Yeyang and "
    "Chang, Li-Wen and Gu, Jiuxiang and Dong, Zhen and Anandkumar, Anima and Asi, Abedelkadir and Hu, Junjie", 2025, "2505.24133",
)  # fmt: skip
SNAPKV = Paper(
    "li2024snapkv", "SnapKV: LLM Knows What You are Looking for Before Generation",
    "Li, Yuhong and Huang, Yingbing and Yang, Bowen and Venkitesh, Bharat and Locatelli, Acyr and Ye, Hanchen and Cai, Tianle and "
    "Lewis, Patrick and Chen, Deming", 2024, "2404.14469",
)  # fmt: skip
PYRAMID = Paper(
    "cai2024pyramidkv", "PyramidKV: Dynamic KV Cache Compression based on Pyramidal Information Funneling",
    "Cai, Zefan and Zhang, Yichi and Gao, Bofei and Liu, Yuliang and Li, Yucheng and Liu, Tianyu and Lu, Keming and Xiong, Wayne and "
    "Dong, Yue and Hu, Junjie and Xiao, Wen", 2024, "2406.02069",
)  # fmt: skip
RAZOR = Paper(
    "tang2024razorattention", "RazorAttention: Efficient KV Cache Compression Through Retrieval Heads",
    "Tang, Hanlin and Lin, Yang and Lin, Jing and Han, Qingsen and Hong, Shikuan and Yao, Yiwu and Wang, Gongyi", 2024, "2407.15891",
)  # fmt: skip
DUO = Paper(
    "xiao2024duoattention", "DuoAttention: Efficient Long-Context LLM Inference with Retrieval and Streaming Heads",
    "Xiao, Guangxuan and Tang, Jiaming and Zuo, Jingwei and Guo, Junxian and Yang, Shang and Tang, Haotian and Fu, Yao and Han, Song",
    2024, "2410.10819",
)  # fmt: skip
COMPRESS = Paper(
    "lin2025compresskv", "CompressKV: Semantic Retrieval Heads Know What Tokens are Not Important Before Generation",
    "Lin, Xiaolin and Wang, Jingcun and Kondrateva, Olga and Shi, Yiyu and Li, Bing and Zhang, Grace Li", 2025, "2508.02401",
)  # fmt: skip
KVZIP = Paper(
    "kim2025kvzip", "KVzip: Query-Agnostic KV Cache Compression with Context Reconstruction",
    "Kim, Jang-Hyun and Kim, Jinuk and Kwon, Sangwoo and Lee, Jae W. and Yun, Sangdoo and Song, Hyun Oh", 2025, "2505.23416",
)  # fmt: skip
ADAKV = Paper(
    "feng2024adakv", "Ada-KV: Optimizing KV Cache Eviction by Adaptive Budget Allocation for Efficient LLM Inference",
    "Feng, Yuan and Lv, Junlin and Cao, Yukun and Xie, Xike and Zhou, S. Kevin", 2024, "2407.11550",
)  # fmt: skip
SHADOWKV = Paper(
    "sun2024shadowkv", "ShadowKV: KV Cache in Shadows for High-Throughput Long-Context LLM Inference",
    "Sun, Hanshi and Chang, Li-Wen and Bao, Wenlei and Zheng, Size and Zheng, Ningxin and Liu, Xin and Dong, Harry and "
    "Chi, Yuejie and Chen, Beidi", 2024, "2410.21465",
)  # fmt: skip
TIDAL = Paper(
    "yang2024tidaldecode", "TidalDecode: Fast and Accurate LLM Decoding with Position Persistent Sparse Attention",
    "Yang, Lijie and Zhang, Zhihao and Chen, Zhuofu and Li, Zikun and Jia, Zhihao", 2024, "2410.05076",
)  # fmt: skip
QUEST = Paper(
    "tang2024quest", "Quest: Query-Aware Sparsity for Efficient Long-Context LLM Inference",
    "Tang, Jiaming and Zhao, Yilong and Zhu, Kan and Xiao, Guangxuan and Kasikci, Baris and Han, Song", 2024, "2406.10774",
)  # fmt: skip
DOUBLE = Paper(
    "yang2024doublesparsity", "Post-Training Sparse Attention with Double Sparsity",
    "Yang, Shuo and Sheng, Ying and Gonzalez, Joseph E. and Stoica, Ion and Zheng, Lianmin", 2024, "2408.07092",
)  # fmt: skip
TOKENSELECT = Paper(
    "wu2024tokenselect", "TokenSelect: Efficient Long-Context Inference and Length Extrapolation for LLMs via Dynamic Token-Level KV Cache "
    "Selection", "Wu, Wei and Pan, Zhuoshi and Fu, Kun and Wang, Chao and Chen, Liyi and Bai, Yunchu and Wang, Tianfu and Wang, Zheng "
    "and Xiong, Hui", 2024, "2411.02886",
)  # fmt: skip
KASCADE = Paper(
    "deshmukh2025kascade", "Kascade: A Practical Sparse Attention Method for Long-Context LLM Inference",
    "Deshmukh, Dhruv and Goyal, Saurabh and Kwatra, Nipun and Ramjee, Ramachandran", 2025, "2512.16391",
)  # fmt: skip
INFLLM = Paper(
    "xiao2024infllm", "InfLLM: Training-Free Long-Context Extrapolation for LLMs with an Efficient Context Memory",
    "Xiao, Chaojun and Zhang, Pengle and Han, Xu and Xiao, Guangxuan and Lin, Yankai and Zhang, Zhengyan and Liu, Zhiyuan and "
    "Sun, Maosong", 2024, "2402.04617",
)  # fmt: skip
HIP = Paper(
    "lee2024hip", "A Training-free Sub-quadratic Cost Transformer Model Serving Framework With Hierarchically Pruned Attention",
    "Lee, Heejun and Park, Geon and Lee, Youngwan and Suh, Jaduk and Kim, Jina and Jeong, Wonyoung and Kim, Bumsik and Lee, Hyemin and "
    "Jeon, Myeongjae and Hwang, Sung Ju", 2024, "2406.09827",
)  # fmt: skip
LSERVE = Paper(
    "yang2025lserve", "LServe: Efficient Long-sequence LLM Serving with Unified Sparse Attention",
    "Yang, Shang and Guo, Junxian and Tang, Haotian and Hu, Qinghao and Xiao, Guangxuan and Tang, Jiaming and Lin, Yujun and "
    "Liu, Zhijian and Lu, Yao and Han, Song", 2025, "2502.14866",
)  # fmt: skip
RECYCLED = Paper(
    "xu2024recycled", "Recycled Attention: Efficient inference for long-context language models",
    "Xu, Fangyuan and Goyal, Tanya and Choi, Eunsol", 2024, "2411.05787",
)  # fmt: skip
GEMFILTER = Paper(
    "shi2024gemfilter", "Discovering the Gems in Early Layers: Accelerating Long-Context LLMs with 1000x Input Token Reduction",
    "Shi, Zhenmei and Ming, Yifei and Nguyen, Xuan-Phi and Liang, Yingyu and Joty, Shafiq", 2024, "2409.17422",
)  # fmt: skip
DISTILL = Paper(
    "jin2025promptdistill", "PromptDistill: Query-based Selective Token Retention in Intermediate Layers for Efficient Large Language "
    "Model Inference", "Jin, Weisheng and Song, Maojia and Pala, Tej Deep and Chia, Yew Ken and Zadeh, Amir and Li, Chuan and "
    "Poria, Soujanya", 2025, "2503.23274",
)  # fmt: skip
LAZY = Paper(
    "fu2024lazyllm", "LazyLLM: Dynamic Token Pruning for Efficient Long Context LLM Inference",
    "Fu, Qichen and Cho, Minsik and Merth, Thomas and Mehta, Sachin and Rastegari, Mohammad and Najibi, Mahyar", 2024, "2407.14057",
)  # fmt: skip
SPATTEN = Paper(
    "wang2021spatten", "SpAtten: Efficient Sparse Attention Architecture with Cascade Token and Head Pruning",
    "Wang, Hanrui and Zhang, Zhekai and Han, Song", 2021, "2012.09852",
)  # fmt: skip
KIVI = Paper(
    "liu2024kivi", "KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache",
    "Liu, Zirui and Yuan, Jiayi and Jin, Hongye and Zhong, Shaochen and Xu, Zhaozhuo and Braverman, Vladimir and Chen, Beidi and "
    "Hu, Xia", 2024, "2402.02750",
)  # fmt: skip
GEAR = Paper(
    "kang2024gear", "GEAR: An Efficient KV Cache Compression Recipe for Near-Lossless Generative Inference of LLM",
    "Kang, Hao and Zhang, Qingru and Kundu, Souvik and Jeong, Geonhwa and Liu, Zaoxing and Krishna, Tushar and Zhao, Tuo",
    2024, "2403.05527",
)  # fmt: skip
THINK = Paper(
    "xu2024think", "ThinK: Thinner Key Cache by Query-Driven Pruning",
    "Xu, Yuhui and Jie, Zhanming and Dong, Hanze and Wang, Lei and Lu, Xudong and Zhou, Aojun and Saha, Amrita and "
    "Xiong, Caiming and Sahoo, Doyen", 2024, "2407.21018",
)  # fmt: skip
CAM = Paper(
    "zhang2024cam", "CaM: Cache Merging for Memory-efficient LLMs Inference",
    "Zhang, Yuxin and Du, Yuxuan and Luo, Gen and Zhong, Yunshan and Zhang, Zhenyu and Liu, Shiwei and Ji, Rongrong", 2024,
    "https://proceedings.mlr.press/v235/zhang24n.html",
)  # fmt: skip
LOOKM = Paper(
    "wan2024lookm", "LOOK-M: Look-Once Optimization in KV Cache for Efficient Multimodal Long-Context Inference",
    "Wan, Zhongwei and Wu, Ziang and Liu, Che and Huang, Jinfa and Zhu, Zhihong and Jin, Peng and Wang, Longyue and Yuan, Li",
    2024, "2406.18139",
)  # fmt: skip
EMS = Paper(
    "li2024ems", "EMS: Adaptive Evict-then-Merge Strategy for Head-wise KV Cache Compression Based on Global-Local Importance",
    "Li, Yingxin and Li, Ye and Meng, Yuan and Ma, Xinzhu and Geng, Zihan and Xia, Shutao and Wang, Zhi", 2024, "2412.08521",
)  # fmt: skip
TRANSMLA = Paper(
    "meng2025transmla", "TransMLA: Multi-head Latent Attention Is All You Need",
    "Meng, Fanxu and Tang, Pingzhi and Tang, Xiaojuan and Yao, Zengwei and Sun, Xing and Zhang, Muhan", 2025, "2502.07864",
)  # fmt: skip
MINICACHE = Paper(
    "liu2024minicache", "MiniCache: KV Cache Compression in Depth Dimension for Large Language Models",
    "Liu, Akide and Liu, Jing and Pan, Zizheng and He, Yefei and Haffari, Gholamreza and Zhuang, Bohan", 2024, "2405.14366",
)  # fmt: skip
HYDRAGEN = Paper(
    "juravsky2024hydragen", "Hydragen: High-Throughput LLM Inference with Shared Prefixes",
    "Juravsky, Jordan and Brown, Bradley and Ehrlich, Ryan and Fu, Daniel Y. and R{\\'e}, Christopher and Mirhoseini, Azalia",
    2024, "2402.05099",
)  # fmt: skip
CACHEBLEND = Paper(
    "yao2024cacheblend", "CacheBlend: Fast Large Language Model Serving for RAG with Cached Knowledge Fusion",
    "Yao, Jiayi and Li, Hanchen and Liu, Yuhan and Ray, Siddhant and Cheng, Yihua and Zhang, Qizheng and Du, Kuntai and Lu, Shan and "
    "Jiang, Junchen", 2024, "2405.16444",
)  # fmt: skip
KVSHARE = Paper(
    "yang2025kvshare", "KVShare: An LLM Service System with Efficient and Effective Multi-Tenant KV Cache Reuse",
    "Yang, Huan and Zhang, Renji and Huang, Mingzhe and Wang, Weijun and Tang, Yin and Li, Yuanchun and Liu, Yunxin and Zhang, Deyu",
    2025, "2503.16525",
)  # fmt: skip
LOOKUP = Paper(
    "saxena2023promptlookup", "Prompt Lookup Decoding", "Saxena, Apoorv", 2023, "GitHub: apoorvumang/prompt-lookup-decoding"
)
RECYCLING = Paper(
    "luo2024recycling", "Turning Trash into Treasure: Accelerating Inference of Large Language Models with Token Recycling",
    "Luo, Xianzhen and Wang, Yixuan and Zhu, Qingfu and Zhang, Zhiming and Zhang, Xuanyu and Yang, Qing and Xu, Dongliang",
    2024, "2408.08696",
)  # fmt: skip
MINFERENCE = Paper(
    "jiang2024minference", "MInference 1.0: Accelerating Pre-filling for Long-Context LLMs via Dynamic Sparse Attention",
    "Jiang, Huiqiang and Li, Yucheng and Zhang, Chengruidong and Wu, Qianhui and Luo, Xufang and Ahn, Surin and Han, Zhenhua and "
    "Abdi, Amir H. and Li, Dongsheng and Lin, Chin-Yew and Yang, Yuqing and Qiu, Lili", 2024, "2407.02490",
)  # fmt: skip
SENTENCEKV = Paper(
    "zhu2025sentencekv", "SentenceKV: Efficient LLM Inference via Sentence-Level Semantic KV Caching",
    "Zhu, Yuxuan and Falahati, Ali and Yang, David H. and Amiri, Mohammad Mohammadi", 2025, "2504.00970",
)  # fmt: skip
FLEXPREFILL = Paper(
    "lai2025flexprefill", "FlexPrefill: A Context-Aware Sparse Attention Mechanism for Efficient Long-Sequence Inference",
    "Lai, Xunhao and Lu, Jianqiao and Luo, Yao and Ma, Yiyuan and Zhou, Xun", 2025, "2502.20766",
)  # fmt: skip
SCBENCH = Paper(
    "li2024scbench", "SCBench: A KV Cache-Centric Analysis of Long-Context Methods",
    "Li, Yucheng and Jiang, Huiqiang and Wu, Qianhui and Luo, Xufang and Ahn, Surin and Zhang, Chengruidong and Abdi, Amir H. and "
    "Li, Dongsheng and Gao, Jianfeng and Yang, Yuqing and Qiu, Lili", 2024, "2412.10319",
)  # fmt: skip
S2 = Paper(
    "lin2024s2attention", "Efficient LLM Training and Serving with Heterogeneous Context Sharding among Attention Heads",
    "Lin, Xihui and Zhang, Yunan and Ge, Suyu and Ren, Liliang and Patra, Barun and Chaudhary, Vishrav and Peng, Hao and Song, Xia",
    2024, "2407.17678",
)  # fmt: skip
VIDEOXL2 = Paper(
    "qin2025videoxl2", "Video-XL-2: Towards Very Long-Video Understanding Through Task-Aware KV Sparsification",
    "Qin, Minghao and Liu, Xiangrui and Liang, Zhengyang and Shu, Yan and Yuan, Huaying and Zhou, Juenjie and Xiao, Shitao and "
    "Zhao, Bo and Liu, Zheng", 2025, "2506.19225",
)  # fmt: skip
TRIE = Paper(
    "zhao2023lookahead", "Lookahead: An Inference Acceleration Framework for Large Language Model with Lossless Generation Accuracy",
    "Zhao, Yao and Xie, Zhitian and Liang, Chen and Zhuang, Chenyi and Gu, Jinjie", 2023, "2312.12728",
)  # fmt: skip
LADE = Paper(
    "fu2024lookahead", "Break the Sequential Dependency of LLM Inference Using Lookahead Decoding",
    "Fu, Yichao and Bailis, Peter and Stoica, Ion and Zhang, Hao", 2024, "2402.02057",
)  # fmt: skip
ADED = Paper(
    "liu2024aded", "Adaptive Draft-Verification for Efficient Large Language Model Decoding",
    "Liu, Xukun and Lei, Bowen and Zhang, Ruqi and Xu, Dongkuan", 2024, "2407.12021",
)  # fmt: skip
LAYERSKIP = Paper(
    "elhoushi2024layerskip", "LayerSkip: Enabling Early Exit Inference and Self-Speculative Decoding",
    "Elhoushi, Mostafa and Shrivastava, Akshat and Liskovich, Diana and Hosmer, Basil and Wasti, Bram and Lai, Liangzhen and "
    "Mahmoud, Anas and Acun, Bilge and Agarwal, Saurabh and Roman, Ahmed and Aly, Ahmed A and Chen, Beidi and Wu, Carole-Jean",
    2024, "2404.16710",
)  # fmt: skip
SWIFT = Paper(
    "xia2024swift", "SWIFT: On-the-Fly Self-Speculative Decoding for LLM Inference Acceleration",
    "Xia, Heming and Li, Yongqi and Zhang, Jun and Du, Cunxiao and Li, Wenjie", 2024, "2410.06916",
)  # fmt: skip
DEL = Paper(
    "zarch2025del", "DEL: Context-Aware Dynamic Exit Layer for Efficient Self-Speculative Decoding",
    "Entezari Zarch, Hossein and Gao, Lei and Jiang, Chaoyi and Annavaram, Murali", 2025, "2504.05598",
)  # fmt: skip
SMARTSPEC = Paper(
    "liu2024smartspec", "Optimizing Speculative Decoding for Serving Large Language Models Using Goodput",
    "Liu, Xiaoxuan and Daniel, Cade and Hu, Langxiang and Kwon, Woosuk and Li, Zhuohan and Mo, Xiangxi and Cheung, Alvin and "
    "Deng, Zhijie and Stoica, Ion and Zhang, Hao", 2024, "2406.14066",
)  # fmt: skip
SPECULATIVE = Paper(
    "leviathan2022speculative", "Fast Inference from Transformers via Speculative Decoding",
    "Leviathan, Yaniv and Kalman, Matan and Matias, Yossi", 2022, "2211.17192",
)  # fmt: skip
SPECTR = Paper(
    "sun2023spectr", "SpecTr: Fast Speculative Decoding via Optimal Transport",
    "Sun, Ziteng and Suresh, Ananda Theertha and Ro, Jae Hun and Beirami, Ahmad and Jain, Himanshu and Yu, Felix", 2023, "2310.15141",
)  # fmt: skip
YGGDRASIL = Paper(
    "guan2025yggdrasil", "Yggdrasil: Bridging Dynamic Speculation and Static Runtime for Latency-Optimal Tree-Based LLM Decoding",
    "Guan, Yue and Yu, Changming and Fang, Shihan and Hu, Weiming and Pan, Zaifeng and Wang, Zheng and Liu, Zihan and Zhou, Yangjie and "
    "Ding, Yufei and Guo, Minyi and Leng, Jingwen", 2025, "2512.23858",
)  # fmt: skip
PEARL = Paper(
    "liu2024pearl", "PEARL: Parallel Speculative Decoding with Adaptive Draft Length",
    "Liu, Tianyu and Li, Yun and Lv, Qitan and Liu, Kai and Zhu, Jianchen and Hu, Winston and Sun, Xiao", 2024, "2408.11850",
)  # fmt: skip
RAPID = Paper(
    "chen2025rapid", "Long-Context Inference with Retrieval-Augmented Speculative Decoding",
    "Chen, Guanzheng and Feng, Qilong and Ni, Jinjie and Li, Xin and Shieh, Michael Qizhe", 2025, "2502.20330",
)  # fmt: skip
FFNSKIP = Paper(
    "jaiswal2024ffnskipllm", "FFN-SkipLLM: A Hidden Gem for Autoregressive Decoding with Adaptive Feed Forward Skipping",
    "Jaiswal, Ajay and Hu, Bodun and Yin, Lu and Ro, Yeonju and Liu, Shiwei and Chen, Tianlong and Akella, Aditya", 2024, "2404.03865",
)  # fmt: skip
SKIPDECODE = Paper(
    "delcorro2023skipdecode", "SkipDecode: Autoregressive Skip Decoding with Batching and Caching for Efficient LLM Inference",
    "Del Corro, Luciano and Del Giorno, Allie and Agarwal, Sahaj and Yu, Bin and Awadallah, Ahmed and Mukherjee, Subhabrata",
    2023, "2307.02628",
)  # fmt: skip
R2R = Paper(
    "fu2025r2r", "R2R: Efficiently Navigating Divergent Reasoning Paths with Small-Large Model Token Routing",
    "Fu, Tianyu and Ge, Yi and You, Yichen and Liu, Enshu and Yuan, Zhihang and Dai, Guohao and Yan, Shengen and Yang, Huazhong and "
    "Wang, Yu", 2025, "2505.21600",
)  # fmt: skip
