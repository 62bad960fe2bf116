import json,sys,time,collections
from trl_reasoning_distill.verification.verify import verify_answers
def load(p): return [json.loads(l) for l in open(p)]
D='/work/shared/data/'
def run(name,outs,golds,exp,show=40,**k):
    t=time.time(); vs=verify_answers(outs,golds,num_workers=2,**k); t=time.time()-t
    fc=[(i,v) for i,(v,e) in enumerate(zip(vs,exp)) if v.status=='correct' and e!='correct']
    fi=[(i,v) for i,(v,e) in enumerate(zip(vs,exp)) if v.status!='correct' and e=='correct']
    st=[(i,v) for i,(v,e) in enumerate(zip(vs,exp)) if v.status!=e and e!='correct' and v.status!='correct']
    print(f"== {name}: n {len(vs)} falsecorrect {len(fc)} falseincorrect {len(fi)} otherstatus {len(st)}  {len(vs)/t:.0f}/s  {dict(collections.Counter(v.method for v in vs))}")
    for tag,l in (('FC',fc),('FI',fi),('ST',st)):
        for i,v in l[:show]: print(tag,i,repr(golds[i][-90:]),'|',repr(outs[i][-110:]),'|',v.status,v.rule,repr(v.extracted)[:90],'|',v.reason[:150])
if __name__=='__main__':
    which=sys.argv[1:]
    if not which or 'reports' in which:
        r=load(D+'answers/reports.jsonl'); run('reports',[x['output'] for x in r],[x['gold'] for x in r],[x['expected'] for x in r])
    if not which or 'eq' in which:
        r=load(D+'equivalence_cases/math_verify.jsonl'); run('eq',[x['pred'] for x in r],[x['gold'] for x in r],['correct' if x['expected'] else 'incorrect' for x in r])
    if not which or 'gsm' in which:
        r=load(D+'model_outputs/openai_gpt3_gsm8k.jsonl'); run('gpt3',[x['response'] for x in r],[x['gold'] for x in r],['correct' if x['published_correct'] else 'incorrect' for x in r],show=12)
        r=load(D+'gsm8k/test.jsonl'); run('gsm8k',[x['answer'] for x in r],[x['answer'].rpartition('####')[2].strip() for x in r],['correct']*len(r))
    if not which or 'math' in which:
        sys.path.insert(0,'benchmarks'); from verification_cases import math_cases
        c=[k for i,row in enumerate(load(D+'math/math500.jsonl')) for k in math_cases(row,i)]
        run('math',[x.output for x in c],[x.gold for x in c],['correct' if x.expected else 'incorrect' for x in c],show=60)
