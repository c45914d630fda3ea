"""The subjects of CMMLU and C-Eval by group, as their publishers sort them (CMMLU's src/categories.py, C-Eval's
subject_mapping.json)."""

CMMLU = {
    "STEM": """anatomy astronomy college_actuarial_science college_engineering_hydrology college_mathematics
        college_medical_statistics conceptual_physics computer_science electrical_engineering elementary_mathematics
        genetics high_school_biology high_school_chemistry high_school_mathematics high_school_physics machine_learning
        virology""",
    "humanities": """arts chinese_history chinese_literature college_law global_facts international_law jurisprudence
        logical marxist_theory philosophy professional_law world_history world_religions""",
    "social sciences": """ancient_chinese business_ethics chinese_civil_service_exam chinese_food_culture
        chinese_foreign_policy chinese_teacher_qualification college_education economics education elementary_chinese
        ethnology high_school_geography high_school_politics journalism management marketing modern_chinese
        professional_accounting professional_psychology public_relations security_study sociology""",
    "other": """agronomy chinese_driving_rule clinical_knowledge college_medicine computer_security
        construction_project_management elementary_commonsense elementary_information_and_technology food_science
        human_sexuality legal_and_moral_basis nutrition professional_medicine sports_science
        traditional_chinese_medicine""",
    "China-specific": """ancient_chinese chinese_civil_service_exam chinese_driving_rule chinese_food_culture
        chinese_foreign_policy chinese_history chinese_literature chinese_teacher_qualification
        construction_project_management elementary_chinese elementary_commonsense ethnology high_school_politics
        modern_chinese traditional_chinese_medicine""",
}
CEVAL = {
    "STEM": """computer_network operating_system computer_architecture college_programming college_physics
        college_chemistry advanced_mathematics probability_and_statistics discrete_mathematics electrical_engineer
        metrology_engineer high_school_mathematics high_school_physics high_school_chemistry high_school_biology
        middle_school_mathematics middle_school_biology middle_school_physics middle_school_chemistry
        veterinary_medicine""",
    "humanities": """modern_chinese_history ideological_and_moral_cultivation logic law
        chinese_language_and_literature art_studies professional_tour_guide legal_professional high_school_chinese
        high_school_history middle_school_history""",
    "social sciences": """college_economics business_administration marxism mao_zedong_thought education_science
        teacher_qualification high_school_politics high_school_geography middle_school_politics
        middle_school_geography""",
    "other": """civil_servant sports_science plant_protection basic_medicine clinical_medicine urban_and_rural_planner
        accountant fire_engineer environmental_impact_assessment_engineer tax_accountant physician""",
}


def groups_of(subjects: dict[str, str]) -> dict[str, tuple[str, ...]]:
    """{subject: its groups} from one of the tables above."""
    found: dict[str, tuple[str, ...]] = {}
    for group, names in subjects.items():
        for subject in names.split():
            found[subject] = (*found.get(subject, ()), group)
    return found
