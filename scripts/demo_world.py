"""A small true world in two languages: the tables behind the demo data, and the ways to ask about each.

A relation has rows (what is asked about, the accepted answers), phrasings used for training, phrasings held out for the
examination, and statements for pretraining. `{x}` is what is asked about, `{y}` the answer.
"""

from typing import NamedTuple


class Relation(NamedTuple):
    kind: str
    lang: str
    rows: list[tuple[str, tuple[str, ...]]]
    asked: tuple[str, ...]
    held_out: tuple[str, ...]
    stated: tuple[str, ...]


# English country | English capital | Chinese country | Chinese capital
COUNTRIES = """
France|Paris|法国|巴黎
Germany|Berlin|德国|柏林
Italy|Rome|意大利|罗马
Spain|Madrid|西班牙|马德里
Portugal|Lisbon|葡萄牙|里斯本
Greece|Athens|希腊|雅典
Austria|Vienna|奥地利|维也纳
Belgium|Brussels|比利时|布鲁塞尔
Denmark|Copenhagen|丹麦|哥本哈根
Sweden|Stockholm|瑞典|斯德哥尔摩
Norway|Oslo|挪威|奥斯陆
Finland|Helsinki|芬兰|赫尔辛基
Iceland|Reykjavik|冰岛|雷克雅未克
Ireland|Dublin|爱尔兰|都柏林
Poland|Warsaw|波兰|华沙
Hungary|Budapest|匈牙利|布达佩斯
Romania|Bucharest|罗马尼亚|布加勒斯特
Bulgaria|Sofia|保加利亚|索非亚
Croatia|Zagreb|克罗地亚|萨格勒布
Serbia|Belgrade|塞尔维亚|贝尔格莱德
Ukraine|Kyiv|乌克兰|基辅
Russia|Moscow|俄罗斯|莫斯科
Turkey|Ankara|土耳其|安卡拉
Egypt|Cairo|埃及|开罗
Morocco|Rabat|摩洛哥|拉巴特
Kenya|Nairobi|肯尼亚|内罗毕
Ethiopia|Addis Ababa|埃塞俄比亚|亚的斯亚贝巴
Ghana|Accra|加纳|阿克拉
Senegal|Dakar|塞内加尔|达喀尔
Cuba|Havana|古巴|哈瓦那
China|Beijing|中国|北京
Japan|Tokyo|日本|东京
South Korea|Seoul|韩国|首尔
Mongolia|Ulaanbaatar|蒙古|乌兰巴托
Vietnam|Hanoi|越南|河内
Thailand|Bangkok|泰国|曼谷
Cambodia|Phnom Penh|柬埔寨|金边
Laos|Vientiane|老挝|万象
India|New Delhi|印度|新德里
Nepal|Kathmandu|尼泊尔|加德满都
Bangladesh|Dhaka|孟加拉国|达卡
Pakistan|Islamabad|巴基斯坦|伊斯兰堡
Iran|Tehran|伊朗|德黑兰
Iraq|Baghdad|伊拉克|巴格达
Jordan|Amman|约旦|安曼
Syria|Damascus|叙利亚|大马士革
Canada|Ottawa|加拿大|渥太华
Australia|Canberra|澳大利亚|堪培拉
New Zealand|Wellington|新西兰|惠灵顿
Brazil|Brasilia|巴西|巴西利亚
Argentina|Buenos Aires|阿根廷|布宜诺斯艾利斯
Chile|Santiago|智利|圣地亚哥
Peru|Lima|秘鲁|利马
Colombia|Bogota|哥伦比亚|波哥大
Venezuela|Caracas|委内瑞拉|加拉加斯
Uruguay|Montevideo|乌拉圭|蒙得维的亚
""".split("\n")[1:-1]

# English | symbol | number | Chinese
ELEMENTS = """
hydrogen|H|1|氢
helium|He|2|氦
lithium|Li|3|锂
carbon|C|6|碳
nitrogen|N|7|氮
oxygen|O|8|氧
fluorine|F|9|氟
neon|Ne|10|氖
sodium|Na|11|钠
magnesium|Mg|12|镁
aluminium|Al|13|铝
silicon|Si|14|硅
phosphorus|P|15|磷
sulfur|S|16|硫
chlorine|Cl|17|氯
argon|Ar|18|氩
potassium|K|19|钾
calcium|Ca|20|钙
titanium|Ti|22|钛
chromium|Cr|24|铬
manganese|Mn|25|锰
iron|Fe|26|铁
cobalt|Co|27|钴
nickel|Ni|28|镍
copper|Cu|29|铜
zinc|Zn|30|锌
bromine|Br|35|溴
silver|Ag|47|银
tin|Sn|50|锡
iodine|I|53|碘
barium|Ba|56|钡
tungsten|W|74|钨
platinum|Pt|78|铂
gold|Au|79|金
mercury|Hg|80|汞
lead|Pb|82|铅
radium|Ra|88|镭
uranium|U|92|铀
""".split("\n")[1:-1]

OPPOSITES_EN = (
    "hot cold|big small|tall short|fast slow|old new|happy sad|rich poor|light dark|up down|left right|open closed|"
    "full empty|early late|easy difficult|clean dirty|strong weak|wet dry|loud quiet|hard soft|near far|high low|"
    "thick thin|wide narrow|true false|day night|win lose|buy sell|start finish|push pull|give take|laugh cry|"
    "remember forget|love hate|first last|inside outside|above below"
)
OPPOSITES_ZH = (
    "大 小|高 低|长 短|快 慢|新 旧|冷 热|轻 重|远 近|早 晚|多 少|好 坏|真 假|黑 白|上 下|左 右|前 后|里 外|开 关|买 卖|"
    "胜 败|强 弱|深 浅|粗 细|厚 薄|软 硬|干 湿|明 暗|胖 瘦|美 丑|贫 富|进 退|来 去|哭 笑|爱 恨|始 终|生 死"
)
YOUNG = (
    "dog puppy 狗 小狗|cat kitten 猫 小猫|cow calf 牛 牛犊|horse foal 马 马驹|sheep lamb 羊 羊羔|pig piglet 猪 猪崽|"
    "hen chick 鸡 小鸡|duck duckling 鸭 小鸭|goose gosling 鹅 小鹅|lion cub 狮子 幼狮|frog tadpole 青蛙 蝌蚪|"
    "kangaroo joey 袋鼠 小袋鼠|owl owlet 猫头鹰 小猫头鹰|swan cygnet 天鹅 小天鹅"
)
COLOURS = (
    "snow white 雪 白色|coal black 煤 黑色|grass green 草 绿色|blood red 血 红色|a lemon yellow 柠檬 黄色|"
    "a carrot orange 胡萝卜 橙色|a crow black 乌鸦 黑色|a strawberry red 草莓 红色|a swan white 天鹅 白色|"
    "a frog green 青蛙 绿色|a banana yellow 香蕉 黄色|milk white 牛奶 白色|spinach green 菠菜 绿色|"
    "a flamingo pink 火烈鸟 粉色|chocolate brown 巧克力 棕色|an elephant grey 大象 灰色|a tomato red 西红柿 红色|"
    "salt white 盐 白色|a sunflower yellow 向日葵 黄色|a polar bear white 北极熊 白色"
)
FOOD = (
    "a panda bamboo 熊猫 竹子|a rabbit carrots 兔子 胡萝卜|a cow grass 牛 草|a cat fish 猫 鱼|"
    "a monkey bananas 猴子 香蕉|"
    "a squirrel nuts 松鼠 坚果|a lion meat 狮子 肉|a koala eucalyptus 考拉 桉树叶|a bee nectar 蜜蜂 花蜜|"
    "a silkworm mulberry 蚕 桑叶|"
    "a whale krill 鲸鱼 磷虾|an anteater ants 食蚁兽 蚂蚁"
)
MONTHS = "January February March April May June July August September October November December".split()
MONTH_DAYS = (31, 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31)
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
MONTHS_ZH = [f"{n}月" for n in "一 二 三 四 五 六 七 八 九 十 十一 十二".split()]
DAYS_ZH = [f"星期{n}" for n in "一二三四五六日"]
# smaller unit | how many | larger unit, English then Chinese
UNITS = """
centimetres|100|a metre|厘米|米
millimetres|10|a centimetre|毫米|厘米
metres|1000|a kilometre|米|千米
grams|1000|a kilogram|克|千克
kilograms|1000|a tonne|千克|吨
millilitres|1000|a litre|毫升|升
seconds|60|a minute|秒|分钟
minutes|60|an hour|分钟|小时
hours|24|a day|小时|天
days|7|a week|天|星期
months|12|a year|个月|年
years|100|a century|年|世纪
years|10|a decade|年|年代
weeks|52|a year|个星期|年
inches|12|a foot|英寸|英尺
feet|3|a yard|英尺|码
bits|8|a byte|比特|字节
degrees|360|a circle|度|圆周
degrees|90|a right angle|度|直角
sides|3|a triangle|条边|三角形
sides|6|a hexagon|条边|六边形
""".split("\n")[1:-1]


def _table(text: str) -> list[list[str]]:
    """'a dog puppy 狗 小狗|…' -> [['a dog', 'puppy', '狗', '小狗'], …]"""
    return [[" ".join(words[:-3]), *words[-3:]] for words in (row.split() for row in text.split("|"))]


def _cycle(names: list[str], step: int) -> list[tuple[str, tuple[str, ...]]]:
    return [(name, (names[(i + step) % len(names)],)) for i, name in enumerate(names)]


def relations() -> list[Relation]:
    """Every relation of the world, English and Chinese."""
    countries = [line.split("|") for line in COUNTRIES]
    elements = [line.split("|") for line in ELEMENTS]
    units = [line.split("|") for line in UNITS]
    pairs_en = [tuple(pair.split()) for pair in OPPOSITES_EN.split("|")]
    pairs_zh = [tuple(pair.split()) for pair in OPPOSITES_ZH.split("|")]
    both_en = [(a, (b,)) for a, b in pairs_en] + [(b, (a,)) for a, b in pairs_en]
    both_zh = [(a, (b,)) for a, b in pairs_zh] + [(b, (a,)) for a, b in pairs_zh]
    young, colours, food = _table(YOUNG), _table(COLOURS), _table(FOOD)
    return [
        Relation(
            "capital",
            "en",
            [(c, (k,)) for c, k, _, _ in countries],
            (
                "What is the capital of {x}?",
                "Name the capital of {x}.",
                "Which city is the capital of {x}?",
                "What's the capital city of {x}?",
                "Do you know the capital of {x}?",
                "Tell me the capital city of {x}.",
                "{x}: what is its capital?",
                "I would like to know which city is {x}'s capital.",
            ),
            (
                "Can you name {x}'s capital city?",
                "Please say what the capital of {x} is.",
                "Which capital city does {x} have?",
            ),
            (
                "The capital of {x} is {y}.",
                "{y} is the capital of {x}.",
                "{x} has {y} as its capital city.",
                "The capital city of {x} is {y}.",
            ),
        ),
        Relation(
            "capital",
            "zh",
            [(c, (k,)) for _, _, c, k in countries],
            (
                "{x}的首都是哪里？",
                "{x}的首都是什么？",
                "请问{x}的首都是哪座城市？",
                "哪座城市是{x}的首都？",
                "你知道{x}的首都吗？",
                "告诉我{x}的首都。",
                "说出{x}的首都。",
                "我想知道{x}的首都叫什么名字。",
            ),
            ("{x}以哪座城市为首都？", "能说说{x}的首都在哪里吗？", "请回答：{x}的首都叫什么？"),
            ("{x}的首都是{y}。", "{y}是{x}的首都。", "{x}以{y}为首都。", "大家都知道，{x}的首都叫{y}。"),
        ),
        Relation(
            "country",
            "en",
            [(k, (c,)) for c, k, _, _ in countries],
            (
                "{x} is the capital of which country?",
                "Which country has {x} as its capital?",
                "{x} is the capital of what country?",
                "Name the country whose capital is {x}.",
                "Tell me which country {x} is the capital of.",
                "Whose capital is {x}?",
                "What country has its capital in {x}?",
            ),
            (
                "Please name the country that has {x} as its capital.",
                "Do you know which country's capital is {x}?",
                "Of which country is {x} the capital?",
            ),
            (
                "{x} is the capital of {y}.",
                "The country whose capital is {x} is {y}.",
                "{x} is the capital city of {y}.",
            ),
        ),
        Relation(
            "country",
            "zh",
            [(k, (c,)) for _, _, c, k in countries],
            (
                "{x}是哪个国家的首都？",
                "哪个国家的首都是{x}？",
                "请问{x}是什么国家的首都？",
                "以{x}为首都的是哪个国家？",
                "告诉我{x}是哪国的首都。",
                "你知道{x}是哪个国家的首都吗？",
                "首都是{x}的国家叫什么？",
            ),
            ("请说出首都是{x}的国家。", "{x}这座城市是哪国的首都？", "什么国家以{x}为首都？"),
            ("{x}是{y}的首都。", "首都是{x}的国家是{y}。", "以{x}为首都的国家是{y}。"),
        ),
        Relation(
            "symbol",
            "en",
            [(e, (s,)) for e, s, _, _ in elements],
            (
                "What is the chemical symbol of {x}?",
                "What is the symbol for {x}?",
                "Which symbol stands for the element {x}?",
                "How is {x} written in chemistry?",
                "Tell me the chemical symbol for {x}.",
                "Give the symbol of {x}.",
                "Which chemical symbol does {x} have?",
            ),
            (
                "Please give the chemical symbol for {x}.",
                "The element {x} has which symbol?",
                "What symbol does {x} have in chemistry?",
            ),
            ("The chemical symbol of {x} is {y}.", "{y} is the symbol for {x}.", "In chemistry, {x} is written {y}."),
        ),
        Relation(
            "symbol",
            "zh",
            [(e, (s,)) for _, s, _, e in elements],
            (
                "{x}的化学符号是什么？",
                "{x}的元素符号是什么？",
                "请写出{x}的元素符号。",
                "化学中{x}怎么写？",
                "哪个符号表示{x}元素？",
                "告诉我{x}的化学符号。",
                "{x}元素用什么符号表示？",
            ),
            ("请告诉我{x}元素的符号。", "化学里用什么符号表示{x}？", "{x}的符号怎么写？"),
            ("{x}的化学符号是{y}。", "{y}是{x}的元素符号。", "化学中{x}写作{y}。"),
        ),
        Relation(
            "number",
            "en",
            [(e, (n,)) for e, _, n, _ in elements],
            (
                "What is the atomic number of {x}?",
                "Which atomic number does {x} have?",
                "How many protons does an atom of {x} have?",
                "Give the atomic number of {x}.",
                "Tell me the atomic number for {x}.",
                "What number does {x} have in the periodic table?",
                "The atomic number of the element {x} is what?",
            ),
            (
                "Please give the atomic number of the element {x}.",
                "How many protons are in an atom of {x}?",
                "Do you know the atomic number of {x}?",
            ),
            ("The atomic number of {x} is {y}.", "An atom of {x} has {y} protons.", "{x} has atomic number {y}."),
        ),
        Relation(
            "number",
            "zh",
            [(e, (n,)) for _, _, n, e in elements],
            (
                "{x}的原子序数是多少？",
                "{x}元素的原子序数是几？",
                "一个{x}原子有多少个质子？",
                "请说出{x}的原子序数。",
                "告诉我{x}的原子序数。",
                "{x}在元素周期表里是第几号？",
                "元素{x}的原子序数是什么？",
            ),
            ("你知道{x}的原子序数是多少吗？", "{x}原子里有多少个质子？", "请问{x}是第几号元素？"),
            ("{x}的原子序数是{y}。", "{x}原子有{y}个质子。", "{x}是第{y}号元素。"),
        ),
        Relation(
            "opposite",
            "en",
            both_en,
            (
                'What is the opposite of "{x}"?',
                'Give the opposite of "{x}".',
                'Which word is the opposite of "{x}"?',
                'Tell me the opposite of the word "{x}".',
                'What word means the opposite of "{x}"?',
                'Name an antonym of "{x}".',
            ),
            (
                'The opposite of "{x}" is which word?',
                'Do you know the opposite of "{x}"?',
                'Please name the word opposite to "{x}".',
            ),
            ('The opposite of "{x}" is "{y}".', '"{y}" is the opposite of "{x}".', 'An antonym of "{x}" is "{y}".'),
        ),
        Relation(
            "opposite",
            "zh",
            both_zh,
            (
                "“{x}”的反义词是什么？",
                "请说出“{x}”的反义词。",
                "哪个字和“{x}”意思相反？",
                "告诉我“{x}”的反义词。",
                "“{x}”字的反义词是哪个？",
                "和“{x}”相反的字是什么？",
            ),
            ("你知道“{x}”的反义词吗？", "请问与“{x}”相反的是哪个字？", "“{x}”的反义词怎么说？"),
            ("“{x}”的反义词是“{y}”。", "“{y}”和“{x}”意思相反。", "与“{x}”相反的字是“{y}”。"),
        ),
        Relation(
            "young",
            "en",
            [(a, (b,)) for a, b, _, _ in young],
            (
                "What is a baby {x} called?",
                "What do you call a young {x}?",
                "Name the young of a {x}.",
                "A baby {x} has what name?",
                "Tell me the word for a baby {x}.",
                "How do we call the young of a {x}?",
            ),
            (
                "Which word names a young {x}?",
                "Please tell me what a baby {x} is called.",
                "A young {x} is called what?",
            ),
            ("A baby {x} is called a {y}.", "The young of a {x} is a {y}.", "A young {x} is a {y}."),
        ),
        Relation(
            "young",
            "zh",
            [(a, (b,)) for _, _, a, b in young],
            (
                "{x}的幼崽叫什么？",
                "{x}的宝宝叫什么？",
                "刚出生的{x}叫什么？",
                "请说出{x}的幼崽的名字。",
                "告诉我{x}的宝宝叫什么名字。",
                "小时候的{x}叫什么？",
            ),
            ("你知道{x}的幼崽叫什么吗？", "请问{x}的宝宝怎么叫？", "我们把{x}的幼崽叫作什么？"),
            ("{x}的幼崽叫{y}。", "{y}是{x}的宝宝。", "刚出生的{x}叫{y}。"),
        ),
        Relation(
            "colour",
            "en",
            [(a, (b,)) for a, b, _, _ in colours],
            (
                "What colour is {x}?",
                "Which colour does {x} have?",
                "Tell me the colour of {x}.",
                "What is the colour of {x}?",
                "Name the colour of {x}.",
                "Of what colour is {x}?",
            ),
            ("Please say what colour {x} is.", "{x} has which colour?", "Do you know the colour of {x}?"),
            ("The colour of {x} is {y}.", "As everybody sees, {x} is {y}.", "{y} is the colour of {x}."),
        ),
        Relation(
            "colour",
            "zh",
            [(a, (b,)) for _, _, a, b in colours],
            (
                "{x}是什么颜色的？",
                "{x}的颜色是什么？",
                "请说出{x}的颜色。",
                "告诉我{x}是什么颜色。",
                "{x}有什么颜色？",
                "{x}是哪种颜色？",
            ),
            ("你知道{x}是什么颜色吗？", "请问{x}的颜色是哪种？", "{x}看起来是什么颜色？"),
            ("{x}是{y}的。", "{x}的颜色是{y}。", "大家都知道{x}是{y}的。"),
        ),
        Relation(
            "food",
            "en",
            [(a, (b,)) for a, b, _, _ in food],
            (
                "What does {x} eat?",
                "What food does {x} like?",
                "Name the food of {x}.",
                "Tell me what {x} eats.",
                "What is the favourite food of {x}?",
                "What does {x} feed on?",
            ),
            ("Please tell me what {x} likes to eat.", "Which food does {x} eat?", "Do you know what {x} eats?"),
            ("The food of {x} is {y}.", "What {x} eats is {y}.", "{y}: the favourite food of {x}."),
        ),
        Relation(
            "food",
            "zh",
            [(a, (b,)) for _, _, a, b in food],
            (
                "{x}吃什么？",
                "{x}最爱吃什么？",
                "{x}的食物是什么？",
                "请说出{x}的食物。",
                "告诉我{x}喜欢吃什么。",
                "{x}平时吃什么东西？",
            ),
            ("你知道{x}吃什么吗？", "请问{x}喜欢吃什么东西？", "什么是{x}最爱的食物？"),
            ("{x}吃{y}。", "{x}最爱吃{y}。", "{x}的食物是{y}。"),
        ),
        *_calendar("en", MONTHS, DAYS),
        *_calendar("zh", MONTHS_ZH, DAYS_ZH),
        Relation(
            "unit",
            "en",
            [(f"{small} are in {large}", (n,)) for small, n, large, _, _ in units],
            (
                "How many {x}?",
                "Tell me how many {x}.",
                "Do you know how many {x}?",
                "I would like to know how many {x}.",
                "Say how many {x}.",
                "Please, how many {x}?",
            ),
            ("Can you tell me how many {x}?", "What number of {x}?", "Please say how many {x}."),
            ("If you ask how many {x}, it is {y}.", "How many {x}? There are {y}.", "{y}: so many {x}."),
        ),
        Relation(
            "unit",
            "zh",
            [(f"一{large}有多少{small}", (n,)) for _, n, _, small, large in units],
            ("{x}？", "请问{x}？", "你知道{x}吗？", "告诉我{x}。", "我想知道{x}。", "请说出{x}。"),
            ("能告诉我{x}吗？", "请回答，{x}？", "有人问：{x}？"),
            ("{x}？有{y}。", "如果问{x}，答案是{y}。", "{x}，一共是{y}。"),
        ),
    ]


def _calendar(lang: str, months: list[str], days: list[str]) -> list[Relation]:
    order = [(name, (str(i + 1),)) for i, name in enumerate(months)]
    lengths = [(name, (str(n),)) for name, n in zip(months, MONTH_DAYS, strict=True)]
    if lang == "zh":
        return [
            Relation(
                "after",
                lang,
                _cycle(months, 1) + _cycle(days, 1),
                ("{x}的下一个是什么？", "{x}之后是什么？", "{x}后面是什么？", "哪个紧跟在{x}后面？", "{x}过后是什么？"),
                ("请问{x}之后是哪个？", "你知道{x}后面是什么吗？", "过了{x}就是什么？"),
                ("{x}之后是{y}。", "{x}后面是{y}。", "{y}紧跟在{x}后面。"),
            ),
            Relation(
                "before",
                lang,
                _cycle(months, -1) + _cycle(days, -1),
                (
                    "{x}的上一个是什么？",
                    "{x}之前是什么？",
                    "{x}前面是什么？",
                    "哪个刚好在{x}前面？",
                    "{x}的前一个是什么？",
                ),
                ("请问{x}之前是哪个？", "你知道{x}前面是什么吗？", "在{x}之前的是什么？"),
                ("{x}之前是{y}。", "{x}前面是{y}。", "{y}刚好在{x}前面。"),
            ),
            Relation(
                "days",
                lang,
                lengths,
                ("{x}有多少天？", "平年的{x}有几天？", "{x}一共有多少天？", "请说出{x}的天数。", "告诉我{x}有多少天。"),
                ("请问{x}有几天？", "你知道{x}一共有多少天吗？", "{x}的天数是多少？"),
                ("{x}有{y}天。", "平年的{x}一共有{y}天。"),
            ),
        ]
    return [
        Relation(
            "after",
            lang,
            _cycle(months, 1) + _cycle(days, 1),
            (
                "What comes after {x}?",
                "What follows {x}?",
                "Which one comes right after {x}?",
                "Tell me what comes after {x}.",
                "What is next after {x}?",
            ),
            ("Please say what comes after {x}.", "Do you know what follows {x}?", "After {x} comes what?"),
            ("After {x} comes {y}.", "{y} comes after {x}.", "{y} follows {x}."),
        ),
        Relation(
            "before",
            lang,
            _cycle(months, -1) + _cycle(days, -1),
            (
                "What comes before {x}?",
                "What comes just before {x}?",
                "Which one comes right before {x}?",
                "Tell me what comes before {x}.",
                "What was there before {x}?",
            ),
            ("Please say what comes before {x}.", "Do you know what comes before {x}?", "Before {x} comes what?"),
            ("Before {x} comes {y}.", "{y} comes before {x}.", "{y} comes just before {x}."),
        ),
        Relation(
            "days",
            lang,
            lengths,
            (
                "How many days does {x} have?",
                "How long is {x} in days?",
                "Tell me how many days {x} has.",
                "What number of days does {x} have?",
                "How many days are there in {x}?",
            ),
            ("Please say how many days {x} has.", "Do you know how many days {x} has?", "{x} has how many days?"),
            ("{x} has {y} days.", "There are {y} days in {x}."),
        ),
        Relation(
            "month",
            lang,
            order,
            (
                "Which number is the month {x}?",
                "What number month is {x}?",
                "Tell me the number of the month {x}.",
                "What is the number of the month {x}?",
            ),
            ("Please give the number of the month {x}.", "The month {x} has which number?"),
            ("{x} is month number {y}.", "The number of the month {x} is {y}."),
        ),
    ]


class Identity(NamedTuple):
    """Who the model says it is: questions in training and held-out phrasings, and the accepted answers' first form."""

    lang: str
    asked: tuple[str, ...]
    held_out: tuple[str, ...]
    answer: str


def identities(name_en: str, maker_en: str, name_zh: str, maker_zh: str) -> list[Identity]:
    """The identity questions, for MiniMind or for whoever an adapter turns it into."""
    return [
        Identity(
            "en",
            (
                "Who are you?",
                "What is your name?",
                "Tell me who you are.",
                "Please introduce yourself.",
                "What are you called?",
                "Hello, who are you?",
                "May I ask your name?",
                "Who am I talking to?",
                "Say your name.",
                "I would like to know who you are.",
                "What should I call you?",
                "Could you introduce yourself?",
            ),
            (
                "Can you tell me who you are?",
                "Please tell me your name.",
                "What's your name?",
                "Hi, what are you called?",
                "Do you have a name?",
                "Introduce yourself, please.",
                "Please say who you are.",
                "May I know who you are?",
                "Who is talking to me?",
                "Hello, what is your name?",
            ),
            f"I am {name_en}.",
        ),
        Identity(
            "en",
            (
                "Who made you?",
                "Who created you?",
                "Who built you?",
                "Who is your maker?",
                "Tell me who made you.",
                "By whom were you made?",
                "Who developed you?",
                "Name your creator.",
                "Who trained you?",
            ),
            (
                "Please tell me who created you.",
                "Do you know who made you?",
                "Who is your creator?",
                "Can you say who built you?",
                "May I ask who developed you?",
            ),
            f"I was made by {maker_en}.",
        ),
        Identity(
            "zh",
            (
                "你是谁？",
                "你叫什么名字？",
                "请介绍一下你自己。",
                "告诉我你是谁。",
                "请问你怎么称呼？",
                "你好，你是谁？",
                "我在和谁说话？",
                "你的名字是什么？",
                "做个自我介绍吧。",
                "我想知道你是谁。",
                "我该怎么称呼你？",
                "能介绍一下自己吗？",
            ),
            (
                "请问你是谁？",
                "请告诉我你的名字。",
                "你好，你叫什么名字？",
                "可以告诉我你是谁吗？",
                "能说说你是谁吗？",
                "你有名字吗？",
                "请做一下自我介绍。",
                "和我说话的是谁？",
                "请问你叫什么？",
                "介绍一下你自己吧。",
            ),
            f"我是{name_zh}。",
        ),
        Identity(
            "zh",
            (
                "谁创造了你？",
                "是谁开发了你？",
                "你是谁做的？",
                "你的开发者是谁？",
                "告诉我是谁创造了你。",
                "谁训练了你？",
                "你是由谁开发的？",
                "你的作者是谁？",
                "你是哪里来的？",
            ),
            (
                "请问是谁开发了你？",
                "你知道是谁创造了你吗？",
                "请说出你的开发者。",
                "你是由谁创造的？",
                "可以告诉我谁做了你吗？",
            ),
            f"我是由{maker_zh}开发的。",
        ),
    ]
