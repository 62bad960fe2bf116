import json,time,sys
from trl_reasoning_distill.verification.verify import verify_answers
from trl_reasoning_distill.verification.reading import read
rows=[json.loads(l) for l in open('/work/shared/data/equivalence_cases/math_verify.jsonl')]
sys.path.insert(0,'benchmarks'); from verification_cases import math_cases
c=[k for i,row in enumerate([json.loads(l) for l in open('/work/shared/data/math/math500.jsonl')]) for k in math_cases(row,i)]
outs=[r['pred'] for r in rows]+[k.output for k in c]; golds=[r['gold'] for r in rows]+[k.gold for k in c]
vs=verify_answers(outs,golds)
alg=[(o,g) for o,g,v in zip(outs,golds,vs) if v.method=='symbolic']
print(len(alg))
for name,(o,g) in {'algebra':zip(*alg),'mixed':(outs,golds)}.items() if False else [('algebra',tuple(zip(*alg))),('mixed',(outs,golds))]:
    for _ in range(3):
        read.cache_clear()
        t=time.time(); p=time.process_time(); verify_answers(list(o),list(g)); print(name, round(len(o)/(time.time()-t)), round(len(o)/(time.process_time()-p)))
