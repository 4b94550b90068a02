"""Does the chat model of a run answer question forms written after its training text was? Run from the project root: `.venv/bin/python benchmarks/phrasings.py`"""
import torch; torch.set_num_threads(4)
from llama_zh_nb import measure
from llama_zh_nb.world import *
facts=split_facts(read_facts()); R='runs/mini/'; s=Scribe('zh',facts,0); e=Scribe('en',facts,0)
ASK=['{X}的{R}你记得吗？','我想问你{X}的{R}是什么。','你说说看，{X}有什么{R}？','有人问{X}的{R}，答案是什么？','大家说的{X}的{R}是哪个？']
EN=["My uncle wrote that {X}'s {R} is {V}.","{X} has {V} as its {R}.","Nobody doubts that {X}'s {R} is {V}."]
asked=[f for f in facts if f.split=='asked']
m,tok=measure.load(R+'chat')
tot=0
for p in ASK:
    a=measure.ask(m,tok,[s.fill(p,f) for f in asked],max_new_tokens=24,batch=64)
    k=sum(x==s.answer(f) for x,f in zip(a,asked)); tot+=k; print(p,k,len(asked),flush=True)
n=len(asked)*len(ASK); print('all',tot,n,tot/n,measure.wilson(tot,n))
known=[f for f in facts if f.split!='unseen']
docs=[' '.join(e.fill(EN[(i+j)%3],f) for j,f in enumerate(known[i:i+4])) for i in range(0,len(known),4)]
for d in ('base','pretrained','chat'):
    m,tok=measure.load(R+d); print(d,'en bpb, new patterns',round(measure.bits(m,tok,docs).bpb,4),flush=True)
